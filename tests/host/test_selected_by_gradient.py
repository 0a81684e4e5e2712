"""SaRA Train with weights that are chosen by their gradient."""

import json

import comfy.model_management
import pytest
import torch
from sara_pack.sara_core.training import choosing

from .builders import assert_same_bits, bits, pairs, settings
from .quantised import FAMILY, PACKED, assert_trained_as_the_numbers

CANCELLED = comfy.model_management.InterruptProcessingException


@pytest.fixture(autouse=True)
def few_pictures(monkeypatch):
    """Go over fewer, as each takes its time."""
    monkeypatch.setattr(choosing, "TO_LEARN", 8)
    monkeypatch.setattr(choosing, "TO_KEEP", 8)


def by_gradient(sara, **changes):
    return settings(sara, **{"select_by": "gradient", "fraction": 0.1, "steps": 4, **changes})


def run(sara, patcher, parent, options, num_regularisation=0, resume=False):
    latents, captions = pairs(6)
    examples = sara.examples.Examples(latents, captions, num_regularisation=num_regularisation)
    if resume:
        folder = sara.folder.RunFolder(parent / "run_00001")
        folder.settings = options
    else:
        folder = sara.folder.RunFolder.create(parent, "run", options)
    path, losses, _ = sara.run.run(patcher, examples, folder, None, resume)
    return sara.core.SparseDelta.load(path), losses["loss"]


def equal(one, two):
    assert one.entries.keys() == two.entries.keys()
    for name, entry in one.entries.items():
        assert torch.equal(entry.index, two.entries[name].index), name
        assert torch.equal(entry.values, two.entries[name].values), name


def log(parent):
    return (parent / "run_00001" / "log.txt").read_text()


def test_a_share_of_the_model_is_trained_that_is_not_the_smallest(sara, sd15, tmp_path):
    before = bits(sd15)
    delta, losses = run(sara, sd15, tmp_path, by_gradient(sara))
    assert_same_bits(before, sd15)
    assert len(losses) == 4
    smallest = sara.core.select(
        {n: w for n, w in before.items() if w.dim() > 1}, fraction=0.1, by_parameter=True
    )
    weights = sara.host.base_weights(sd15)
    with_more_than_one_dimension = [n for n, w in weights.items() if w.dim() > 1]
    assert set(delta.entries) <= set(with_more_than_one_dimension)
    for name, entry in delta.entries.items():  # some have fewer with a gradient
        assert 1 <= len(entry.index) <= max(1, round(0.1 * weights[name].numel())), name
    total = sum(weights[name].numel() for name in with_more_than_one_dimension)
    count = sum(len(entry.index) for entry in delta.entries.values())
    assert 0.09 * total < count < 0.1001 * total
    for entry in delta.entries.values():
        assert entry.values.count_nonzero() > 0.9 * len(entry.index)
    both = [
        float(torch.isin(entry.index, smallest.index[name]).float().mean())
        for name, entry in delta.entries.items()
    ]
    assert sum(both) / len(both) < 0.3
    told = json.loads(delta.metadata["sara.settings"])
    assert (told["select_by"], told["fraction"]) == ("gradient", 0.1)
    assert told["learning_rate"] == pytest.approx(2e-5 / 0.1**0.5)
    assert "sara.threshold" not in delta.metadata
    text = log(tmp_path)
    assert "choosing the weights by what they learn: part 1 of " in text
    assert "the 10 % that learn most" in text


def test_regularisation_pictures_say_what_is_kept(sara, sd15, tmp_path):
    options = by_gradient(sara, regularisation_weight=0.0)
    with_others, losses = run(sara, sd15, tmp_path / "with", options, 3)
    again, _ = run(sara, sd15, tmp_path / "again", options, 3)
    equal(with_others, again)
    latents, captions = pairs(6)
    examples = sara.examples.Examples(latents[:3], captions[:3])
    folder = sara.folder.RunFolder.create(tmp_path / "without", "run", options)
    path, alone, _ = sara.run.run(sd15, examples, folder, None)
    without = sara.core.SparseDelta.load(path)
    assert losses[0] == pytest.approx(alone["loss"][0], rel=1e-5)  # the same is learned from
    assert any(
        not torch.equal(entry.index, without.entries[name].index)
        for name, entry in with_others.entries.items()
    )
    assert "beside what the regularisation pictures would lose" in log(tmp_path / "with")


def test_weights_that_keep_more_of_what_is_kept_move_farther(sara, sd15, tmp_path):
    """At one rate AdamW's first update is as large for every weight."""
    options = by_gradient(sara, steps=1, low_rank_weight=0.0, regularisation_weight=0.0)
    rated, _ = run(sara, sd15, tmp_path / "rated", options, 3)
    alike, _ = run(sara, sd15, tmp_path / "alike", options)
    packaged = by_gradient(sara, steps=1, optimizer="schedule_free", regularisation_weight=0.0)
    unrated, _ = run(sara, sd15, tmp_path / "packaged", packaged, 3)

    def spread(delta):
        sizes = torch.cat([entry.values.abs() for entry in delta.entries.values()])
        sizes = sizes[sizes > 0]
        return float(sizes.quantile(0.9) / sizes.quantile(0.1))

    assert spread(rated) > 4
    assert spread(alike) < 1.1
    assert spread(unrated) < 1.1


def test_cancel_while_weights_are_chosen_loses_nothing(sara, sd15, tmp_path, monkeypatch):
    before = bits(sd15)
    original = choosing.Choosing._backward

    def cancel(self, *arguments):
        original(self, *arguments)
        raise CANCELLED()

    monkeypatch.setattr(choosing.Choosing, "_backward", cancel)
    with pytest.raises(CANCELLED):
        run(sara, sd15, tmp_path, by_gradient(sara))
    assert_same_bits(before, sd15)
    for parameter in sd15.model.diffusion_model.parameters():
        assert parameter.grad is None
        assert not parameter._post_accumulate_grad_hooks
    monkeypatch.undo()
    delta, _ = run(sara, sd15, tmp_path / "again", by_gradient(sara))
    assert delta.entries


def test_lack_of_memory_while_weights_are_chosen_is_told(sara, sd15, tmp_path, monkeypatch):
    def fail(self, *arguments):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(choosing.Choosing, "_backward", fail)
    with pytest.raises(torch.OutOfMemoryError) as caught:
        run(sara, sd15, tmp_path, by_gradient(sara))
    assert "memory ran out while weights were chosen by gradient" in str(caught.value)
    assert "To need less memory" in str(caught.value)


@pytest.mark.parametrize("kept", [0, 3])
def test_a_resumed_run_goes_on_with_what_was_chosen(sara, sd15, tmp_path, monkeypatch, kept):
    options = by_gradient(sara, steps=5, layer_rates="attn=0.5")
    whole, losses = run(sara, sd15, tmp_path / "whole", options, kept)
    original = sara.run.Reporter.step

    def step(reporter, report, losses):
        original(reporter, report, losses)
        if report.step == 3:
            raise CANCELLED()

    monkeypatch.setattr(sara.run.Reporter, "step", step)
    with pytest.raises(CANCELLED):
        run(sara, sd15, tmp_path / "cut", options, kept)
    monkeypatch.undo()
    text = log(tmp_path / "cut")
    delta, resumed = run(sara, sd15, tmp_path / "cut", options, kept, resume=True)
    equal(delta, whole)
    assert delta.metadata["sara.fingerprint"] == whole.metadata["sara.fingerprint"]
    assert resumed == losses
    assert "choosing" not in log(tmp_path / "cut")[len(text) :]


@pytest.mark.parametrize(("keep_state", "kept"), [(True, 0), (True, 3), (False, 0), (False, 3)])
def test_more_steps_train_the_same_weights(sara, sd15, tmp_path, keep_state, kept):
    options = by_gradient(sara, keep_state=keep_state)
    first, _ = run(sara, sd15, tmp_path, options, kept)
    text = log(tmp_path)
    more = sara.folder.RunFolder(tmp_path / "run_00001")
    extended = more.settings.extended_by(3, options)
    more.close()
    second, losses = run(sara, sd15, tmp_path, extended, kept, resume=True)
    assert len(losses) == 7
    told = log(tmp_path)[len(text) :]
    assert ("choosing the weights' rates by what they learn, beside" in told) == (
        bool(kept) and not keep_state
    )
    assert "choosing the weights by" not in told
    assert ("of single weights from an eighth of to eight times that" in told) == bool(kept)
    for name, entry in second.entries.items():
        assert torch.equal(entry.index, first.entries[name].index), name
        assert not torch.equal(entry.values, first.entries[name].values), name


@pytest.mark.parametrize(
    "changes",
    [
        {"training_dtype": "fp16", "steps": 1, "batch_size": 1},
        {"offloading": True, "trained_in": "main memory"},
        {"gradient_checkpointing": True, "moments": "8bit"},
    ],
    ids=["fp16", "offloaded", "checkpointed"],
)
def test_it_goes_with_other_ways_to_train(sara, sd15, tmp_path, changes, monkeypatch):
    if "training_dtype" in changes:  # which takes long on a processor
        monkeypatch.setattr(choosing, "TO_LEARN", 2)
        monkeypatch.setattr(choosing, "TO_KEEP", 1)
    same = {name: changes[name] for name in ("steps", "batch_size") if name in changes}
    plain, _ = run(sara, sd15, tmp_path / "plain", by_gradient(sara, **same), 3)
    before = bits(sd15)
    delta, losses = run(sara, sd15, tmp_path / "other", by_gradient(sara, **changes), 3)
    assert_same_bits(before, sd15)
    assert all(0 < loss < 10 for loss in losses)
    shares = [
        float(torch.isin(entry.index, plain.entries[name].index).float().mean())
        for name, entry in delta.entries.items()
        if len(entry.index) > 20
    ]
    assert sum(shares) / len(shares) > 0.95  # to the rounding of what is computed with


@pytest.mark.parametrize("form", ["e4m3fn", "scaled", *PACKED])
def test_in_eight_bits_it_is_that_of_the_numbers(sara, form):
    options = {"select_by": "gradient", "gradient_checkpointing": True}
    assert_trained_as_the_numbers(sara, form, FAMILY, **options)
