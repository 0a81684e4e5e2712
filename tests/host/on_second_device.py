"""Train models of a real ComfyUI on a second device, with their weights waiting in main memory.

Run by `test_second_device` in a process of its own, as torch cannot forget the device.
"""

import re
import tempfile

import pytest
import torch

from ..harness.second_device import FAR, Far
from . import zoo
from .builders import LOOKS, fail_at, settings, train
from .quantised import FAMILY, load, raw_bits, with_patch

CPU, GIB = torch.device("cpu"), 1024**3


@pytest.fixture
def second_device(sara, monkeypatch):
    """Have ComfyUI take the second device for a graphics card of which 4 GB are free."""
    import comfy.model_management as management

    def get_free_memory(device=None, torch_free_too=False):
        count = 64 * GIB if device is None or device.type == "cpu" else 4 * GIB
        return (count, count) if torch_free_too else count

    monkeypatch.setattr(management, "get_free_memory", get_free_memory)
    monkeypatch.setattr(management, "get_total_memory", lambda *_, **__: 64 * GIB)
    monkeypatch.setattr(management, "vram_state", management.VRAMState.NORMAL_VRAM)
    monkeypatch.setattr(management, "get_torch_device", lambda: FAR)
    monkeypatch.setattr(sara.quantised, "SMALL", 1000)  # as layers are small themselves
    monkeypatch.setattr(management, "soft_empty_cache", lambda *_: None)


RATE = 2e-3
OPTIONS = {
    "on the device": {"offloading": False},
    "offloaded": {"weights_on_device": 0.0},
    "trained in main memory": {"weights_on_device": 0.0, "trained_in": "main memory"},
    "all that fits stays": {},
    "some stay": {"weights_on_device": 0.001},
    "checkpointed": {"weights_on_device": 0.0, "gradient_checkpointing": True},
    "moments in eight bits": {"weights_on_device": 0.0, "trained_in": "main memory", "moments": "8bit"},
}  # fmt: skip
CASES = [("float32", options) for options in OPTIONS]
CASES += [("scaled", options) for options in ("offloaded", "trained in main memory")]
CASES += [(form, "offloaded") for form in ("half", "e4m3fn", "mixed")]


def learn(sara, patcher, **options):
    latents, captions = zoo.examples(FAMILY)
    chosen = {"steps": 2, "learning_rate": RATE, "fraction": 0.1, "zeros": "train",
              "training_dtype": "fp32", "low_rank_weight": 0.0, **options}  # fmt: skip
    return train(sara, patcher, latents, captions, settings(sara, **chosen))


def loaded(form, device=FAR):
    patcher = load(form)
    patcher.load_device, patcher.offload_device = device, CPU
    return patcher


def bits(patcher):
    """What is stored, byte for byte, wherever it is."""
    return {name: data.cpu() for name, data in raw_bits(patcher).items()}


def assert_same_bits(before, patcher):
    after = bits(patcher)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]), name


def assert_same_delta(found, expected, turned=0):
    """A last bit may turn the code of an eight-bit moment, which moves that weight by a hundredth of the rate."""
    assert found.entries.keys() == expected.entries.keys()
    far = 0
    for name, entry in expected.entries.items():
        assert torch.equal(found.entries[name].index, entry.index), name
        values = found.entries[name].values
        far += int((~torch.isclose(values, entry.values, rtol=1e-3, atol=1e-6)).sum())
        torch.testing.assert_close(
            values, entry.values, rtol=1e-3, atol=RATE / 100 if turned else 1e-6
        )
    assert far <= turned


@pytest.mark.parametrize(("form", "name"), CASES)
def test_what_is_learned_is_what_is_learned_without(sara, second_device, caplog, form, name):
    options = {"offloading": True, **OPTIONS[name]}
    expected, losses = learn(sara, loaded(form, CPU), moments=options.get("moments", "fp32"))
    patcher = loaded(form)
    before = bits(patcher)
    caplog.set_level("INFO")
    caplog.clear()
    Far.sent = 0
    found, losses_too = learn(sara, patcher, **options)
    assert losses == pytest.approx(losses_too, rel=1e-5)
    assert_same_delta(found, expected, turned=10 if "moments" in options else 0)  # of 109,362
    assert_same_bits(before, patcher)
    said = re.search(
        r"offloading: (\d+) MB of the weights stay on the device, (\d+) MB", caplog.text
    )
    if not options["offloading"]:
        assert said is None
        return
    stay, sent = int(said[1]), int(said[2])
    size = sum(p.nbytes for p in patcher.model.diffusion_model.parameters()) / 1024**2
    assert size - 2 <= stay + sent <= size
    assert (stay > 0.2 * size) == (name in ("all that fits stays", "some stay"))
    assert (sent == 0) == (name == "all that fits stays")
    if sent:  # forward and backward, twice, and the look at its memory before
        assert Far.sent > 4 * sent * 1024**2


@pytest.mark.parametrize(
    ("form", "offloading"),
    [("float32", False), ("float32", True), ("half", True), ("scaled", True), ("mixed", True)],
)
def test_a_lora_that_the_model_carries_is_part_of_what_trains(
    sara, second_device, form, offloading
):
    expected, losses = learn(sara, with_patch(loaded(form, CPU)))
    found, losses_too = learn(sara, with_patch(loaded(form)), offloading=offloading)
    assert losses == pytest.approx(losses_too, rel=1e-2 if form == "mixed" else 1e-3)
    if form in ("float32", "half"):  # others have the patch rounded to eight bits when fully loaded
        assert found.metadata["sara.fingerprint"] == expected.metadata["sara.fingerprint"]
    if form == "float32":
        assert_same_delta(found, expected)


def test_a_cancelled_run_goes_on_as_if_it_had_not_been(sara, second_device):
    expected, losses = learn(sara, loaded("scaled"), steps=4, offloading=True)
    options = {"steps": 4, "learning_rate": RATE, "fraction": 0.1, "zeros": "train",
               "training_dtype": "fp32", "low_rank_weight": 0.0, "offloading": True}  # fmt: skip
    folder = sara.folder.RunFolder.create(tempfile.mkdtemp(), "run", settings(sara, **options))
    latents, captions = zoo.examples(FAMILY)
    patcher = loaded("scaled")
    before = bits(patcher)
    hook = patcher.model.diffusion_model.register_forward_hook(fail_at(LOOKS + 3))
    with pytest.raises(KeyboardInterrupt):
        train(sara, patcher, latents, captions, None, new=folder)
    hook.remove()
    assert_same_bits(before, patcher)
    again = sara.folder.RunFolder(folder.path)
    found, _ = train(sara, patcher, latents, captions, None, resume=again)
    assert_same_delta(found, expected)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("form", ["float32", "scaled"])
def test_copies_do_not_pile_up(sara, second_device, monkeypatch, form, checkpointing):
    from sara_pack.nodes.training import memory

    found, measure = [], memory.measure

    def kept(*given):
        found.append(measure(*given))
        return found[-1]

    monkeypatch.setattr(memory, "measure", kept)
    for offloading in (False, True):
        learn(
            sara, loaded(form), steps=1, offloading=offloading, gradient_checkpointing=checkpointing
        )
    there, waiting = found
    weights = list(loaded(form).model.diffusion_model.parameters())
    largest = max(p.nbytes for p in weights)
    assert waiting.base == sum(p.nbytes for p in weights if p.numel() <= sara.quantised.SMALL)
    assert waiting.activations - there.activations < 3 * largest
    assert waiting.trained == there.trained
    assert there.free == pytest.approx(waiting.free, rel=0.01)
