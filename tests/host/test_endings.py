"""However a run ends, it is saved, explained and resumed exactly."""

import dataclasses
import math

import pytest
import torch
from safetensors.torch import load_file

from .builders import LOOKS, assert_same_bits, bits, fail_at, pairs, settings, train


@pytest.mark.parametrize("when", ["forward", "report"])
def test_an_error_or_cancel_leaves_the_model_as_it_was(sd15, sara, when, monkeypatch):
    import comfy.model_management as management

    latents, captions = pairs(4)
    before = bits(sd15)
    count = [0]

    def fail(*_, **__):
        count[0] += 1
        if count[0] == {"forward": LOOKS + 2, "report": 3}[when]:
            raise management.InterruptProcessingException()

    if when == "forward":
        hook = sd15.model.diffusion_model.register_forward_hook(fail)
    else:
        monkeypatch.setattr(sara.host.Progress, "update", fail)
    with pytest.raises(management.InterruptProcessingException):
        train(sara, sd15, latents, captions, settings(sara, learning_rate=1e-2))
    if when == "forward":
        hook.remove()
    assert_same_bits(before, sd15)
    assert not any(p._post_accumulate_grad_hooks for p in sd15.model.parameters())
    delta, _ = train(sara, sd15, latents, captions, settings(sara))
    assert delta.num_values > 0
    assert_same_bits(before, sd15)


@pytest.mark.parametrize("ending", ["out of memory", "error", "cancel"])
def test_any_ending_is_saved_explained_and_resumed_exactly(sd15, sara, ending, tmp_path):
    import comfy.model_management as management

    latents, captions = pairs(5)
    options = settings(sara, steps=6, learning_rate=1e-3, batch_size=2, progressive=0.3)
    straight, expected_losses = train(sara, sd15, latents, captions, options)
    before = bits(sd15)
    error = {
        "out of memory": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"),
        "error": KeyError("no such layer"),
        "cancel": management.InterruptProcessingException(),
    }[ending]
    count = [0]

    def fail(*_):
        count[0] += 1
        if count[0] > LOOKS + 4:
            raise error

    folder = sara.folder.RunFolder.create(tmp_path, "run", options)
    hook = sd15.model.diffusion_model.register_forward_hook(fail)
    with pytest.raises(type(error)) as caught:
        sara.run.run(sd15, sara.examples.Examples(latents, captions), folder, None)
    hook.remove()
    assert caught.value is error
    text = str(error.args[0])
    assert "all 4 steps are saved in output/sara/" in text
    assert "choose" in text
    assert ("gradient_checkpointing" in text) == (ending == "out of memory")
    assert_same_bits(before, sd15)
    checkpoint = sara.core.SparseDelta.load(folder.path / "checkpoint_0000004_steps.safetensors")
    assert checkpoint.metadata["sara.steps"] == "4"

    again = sara.folder.RunFolder(folder.path)
    delta, losses = train(sara, sd15, latents, captions, None, resume=again)
    assert losses == expected_losses
    for name, entry in straight.entries.items():
        assert torch.equal(entry.values, delta.entries[name].values), name
    assert_same_bits(before, sd15)
    assert "resumed after step 4" in (folder.path / "log.txt").read_text()


def test_resuming_with_other_pictures_or_model_says_what_differs(sd15, emoji64, sara, tmp_path):
    latents, captions = pairs(4)
    options = settings(sara, steps=4)
    folder = sara.folder.RunFolder.create(tmp_path, "run", options)
    hook = sd15.model.diffusion_model.register_forward_hook(fail_at(LOOKS + 2))
    with pytest.raises(KeyboardInterrupt):
        sara.run.run(sd15, sara.examples.Examples(latents, captions), folder, None)
    hook.remove()
    other, _ = pairs(4, seed=7)
    wide, long = pairs(4, 16, 8, 4096, pooled=2048)
    for patcher, examples, message in (
        (sd15, (other, captions), "4 of 8 latents, embeddings and masks have changed"),
        (sd15, (latents[:3], captions[:3]), "6 latents, embeddings and masks, the run had 8"),
        (emoji64, (wide, long), "of the family SD3, the run's SD15"),
    ):
        before = bits(patcher)
        with pytest.raises(ValueError, match=message):
            train(sara, patcher, *examples, None, resume=sara.folder.RunFolder(folder.path))
        assert_same_bits(before, patcher)
    assert sara.folder.RunFolder(folder.path).can_resume


def test_broken_pictures_are_left_out_and_only_broken_ones_end_the_run(sd15, sara, tmp_path):
    latents, captions = pairs(4)
    with torch.inference_mode():
        latents[2] = latents[2] * float("nan")
    before = bits(sd15)
    options = settings(sara, steps=4, batch_size=1)
    folder = sara.folder.RunFolder.create(tmp_path, "run", options)
    delta, losses = train(sara, sd15, latents, captions, options, new=folder)
    kept = [loss for loss, _ in sara.folder.RunFolder(folder.path).read_losses(4)]
    assert sum(loss != loss for loss in kept) == 1
    assert all(math.isfinite(loss) for loss in losses)  # as Plot Loss Graph needs them
    assert all(torch.isfinite(e.values).all() for e in delta.entries.values())
    assert_same_bits(before, sd15)
    with torch.inference_mode():
        latents = [latent * float("nan") for latent in latents]
    with pytest.raises(FloatingPointError, match="5 steps in a row.*\n.*all 5 steps are saved"):
        train(sara, sd15, latents, captions, settings(sara, steps=20))
    assert_same_bits(before, sd15)


def test_the_switch_is_saved(sd15, sara, tmp_path):
    latents, captions = pairs(2)
    options = settings(sara, steps=4, progressive=0.5, save_every_steps=0, keep_state=False)
    folder = sara.folder.RunFolder.create(tmp_path, "run", options)
    train(sara, sd15, latents, captions, None, new=folder)
    log = (folder.path / "log.txt").read_text()
    assert "saved step 2" in log
    assert "finished, saved run_4_steps.safetensors" in log
    assert "saved step 4" not in log


def test_a_file_for_loaders_of_loras_is_written_beside_the_delta(sd15, sara, tmp_path, monkeypatch):
    import comfy.sd

    monkeypatch.setattr(sara.host, "output_root", lambda: str(tmp_path))
    latents, captions = pairs(2)
    exact = settings(sara, steps=2, learning_rate=1e-3, lora_file="differences (exact)")
    folder = sara.folder.RunFolder.create(tmp_path, "run", exact)
    delta, _ = train(sara, sd15, latents, captions, None, new=folder)
    file = folder.path / "run_2_steps_lora.safetensors"
    applied = sara.host.patched_weights(sara.host.apply_delta(sd15, delta, 1.0))
    with torch.inference_mode():
        loaded = comfy.sd.load_lora_for_models(sd15, None, load_file(file), 1.0, 0)[0]
    for (name, found), (_, expected) in zip(
        sara.host.patched_weights(loaded).items(), applied.items(), strict=True
    ):
        assert torch.allclose(found, expected, atol=1e-7), name
    assert "it keeps 100% of the change's energy" in (folder.path / "log.txt").read_text()
    assert file not in sara.output.deltas_of_run("run_00001")

    # One that cannot be written is said; the run has not failed.
    options = settings(sara, steps=2, lora_file="LoRA of rank 16")
    folder = sara.folder.RunFolder.create(tmp_path, "run", options)
    target = folder.path / "run_2_steps_lora.safetensors"
    target.mkdir()
    train(sara, sd15, latents, captions, None, new=folder)
    assert "could not write the LoRA file" in (folder.path / "log.txt").read_text()
    assert target.is_dir()


def test_a_lora_that_cannot_be_made_does_not_fail_a_finished_run(sd15, sara, tmp_path, monkeypatch):
    latents, captions = pairs(2)
    from sara_pack.nodes.training import saver

    def without_room(*_):
        raise RuntimeError("not enough memory: you tried to allocate 24 GB")

    monkeypatch.setattr(saver, "export", without_room)
    options = settings(sara, steps=2, lora_file="LoRA of rank 16")
    folder = sara.folder.RunFolder.create(tmp_path, "run", options)
    train(sara, sd15, latents, captions, None, new=folder)
    log = (folder.path / "log.txt").read_text()
    assert "could not write the LoRA file (RuntimeError: not enough memory" in log
    assert (folder.path / "run_2_steps.safetensors").is_file()


def test_a_state_that_did_not_fit_at_the_end_is_not_gone_on_from(sd15, sara, tmp_path, monkeypatch):
    monkeypatch.setattr(sara.host, "output_root", lambda: str(tmp_path))
    latents, captions = pairs(4)
    options = settings(
        sara, steps=4, learning_rate=1e-3, output_name="run", save_every_steps=2, progressive=0,
        warmup_steps=20,
    )  # fmt: skip
    folder = sara.folders.new_folder(sd15, options)
    train(sara, sd15, latents, captions, None, new=folder)
    more = sara.folders.old_folder(sd15, "run_00001", options, 2)
    kept = more.read_state()
    kept["run"]["step"] = 2  # as 0.2.0 left it beside the delta if the disk was full
    assert more._writer.submit(more._write, kept, {}, 9, torch.float32).result() is None
    delta, losses = train(sara, sd15, latents, captions, None, resume=more)
    assert len(losses) == 6
    assert "going on from run_4_steps.safetensors" in (more.path / "log.txt").read_text()
    rates = [rate for _, rate in sara.folder.RunFolder(more.path).read_losses(6)]
    assert all(rate > 0 for rate in rates)


def test_a_finished_run_goes_on_with_more_steps_on_a_course_of_their_own(
    sd15, sara, tmp_path, monkeypatch
):
    monkeypatch.setattr(sara.host, "output_root", lambda: str(tmp_path))
    latents, captions = pairs(4)
    options = settings(sara, steps=4, learning_rate=1e-3, output_name="run", progressive=0.5)
    first, _ = train(
        sara, sd15, latents, captions, None, new=sara.folders.new_folder(sd15, options)
    )
    more = dataclasses.replace(options, learning_rate=5e-4, lr_schedule="linear")

    again = sara.folders.old_folder(sd15, "run_00001", more, 0)
    assert sara.folders.is_finished(again)  # no more steps: what it has learned is put out
    again.close()
    kept = (tmp_path / "run_00001" / "settings.json").read_text()
    other, _ = pairs(4, seed=7)  # with other pictures it is refused, and stays finished
    with pytest.raises(ValueError, match="cannot be resumed with what is connected"):
        train(
            sara, sd15, other, captions, None,
            resume=sara.folders.old_folder(sd15, "run_00001", more, 2),
        )  # fmt: skip
    assert (tmp_path / "run_00001" / "settings.json").read_text() == kept
    folder = sara.folders.old_folder(sd15, "run_00001", more, 2)
    delta, losses = train(sara, sd15, latents, captions, None, resume=folder)
    assert len(losses) == 6
    rates = [rate for _, rate in sara.folder.RunFolder(folder.path).read_losses(6)]
    assert rates[3] == pytest.approx(1e-3 * 0.5 * (1 + math.cos(math.pi * 3 / 4)))
    assert rates[4:] == [5e-4, 2.5e-4]
    assert delta.metadata["sara.steps"] == "6"
    assert {path.name for path in folder.path.glob("run_*")} == {
        "run_4_steps.safetensors", "run_6_steps.safetensors",
    }  # fmt: skip
    # The second stage goes on: what was frozen in the first run stays as it was.
    frozen = moved = 0
    for name, entry in first.entries.items():
        same = delta.entries[name].values == entry.values
        frozen += int(same.sum())
        moved += int((~same).sum())
    assert frozen > 0
    assert moved > 0

    # Without its state it goes on from its delta.
    (folder.path / "state.safetensors").unlink()
    assert sara.output.resumable_runs() == ["run_00001"]
    folder = sara.folders.old_folder(sd15, "run_00001", more, 1)
    further, losses_too = train(sara, sd15, latents, captions, None, resume=folder)
    assert losses_too[:6] == losses
    assert len(losses_too) == 7
    assert further.metadata["sara.steps"] == "7"
    same = [
        (further.entries[name].values == entry.values).float().mean()
        for name, entry in delta.entries.items()
    ]
    assert 0 < sum(same) / len(same) < 1  # the second stage goes on
    assert all(
        (further.entries[name].values - entry.values).abs().max() < 1e-3
        for name, entry in delta.entries.items()
    )
    assert "going on from run_6_steps.safetensors" in (folder.path / "log.txt").read_text()
    for path in folder.path.glob("*.safetensors"):
        path.unlink()
    with pytest.raises(ValueError, match="neither its state nor its final delta"):
        train(
            sara, sd15, latents, captions, None,
            resume=sara.folders.old_folder(sd15, "run_00001", more, 0),
        )  # fmt: skip


def test_a_full_disk_does_not_stop_the_training(sd15, sara, monkeypatch, caplog):
    latents, captions = pairs(2)
    from sara_pack.sara_core.files import state_file

    original, count = state_file.save_file, [0]

    def full_at_first(*args):
        count[0] += 1
        if count[0] <= 2:
            raise OSError(28, "No space left on device")
        original(*args)

    monkeypatch.setattr(state_file, "save_file", full_at_first)
    caplog.set_level("INFO")
    delta, losses = train(
        sara, sd15, latents, captions, settings(sara, steps=5, save_every_steps=1)
    )
    assert (len(losses), count[0]) == (5, 5)
    assert "No space left on device" in caplog.text
    assert "the training goes on" in caplog.text


@pytest.mark.parametrize("moments", ["fp32", "8bit"])
def test_a_run_with_everything_resumes_exactly(sd15, sara, tmp_path, monkeypatch, moments):
    """Held-out pictures, masks and regularisation pictures, stopped in the middle."""
    latents, captions = pairs(10)
    masks = [torch.rand(1, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(7)]
    examples = sara.examples.Examples(latents, captions, None, masks, num_regularisation=3)
    options = settings(
        sara, steps=8, validation_split=0.3, validate_every_steps=2, output_name="x",
        regularisation_weight=0.7, moments=moments,
    )  # fmt: skip

    def run(parent, resume=None, stop=None):
        folder = resume or sara.folder.RunFolder.create(tmp_path / parent, "run", options)
        add_loss = folder.add_loss

        def add(report):
            add_loss(report)
            if report.step == stop:
                raise KeyboardInterrupt

        folder.add_loss = add
        path, losses, _ = sara.run.run(sd15, examples, folder, None, resume is not None)
        return sara.core.SparseDelta.load(path), losses

    expected, losses = run("straight")
    assert losses["validation_step"] == [0, 2, 4, 6, 8]
    with pytest.raises(KeyboardInterrupt):
        run("stopped", stop=5)
    path = tmp_path / "stopped" / "run_00001"
    found, losses_too = run("stopped", resume=sara.folder.RunFolder(path))
    assert losses == losses_too
    for name, entry in expected.entries.items():
        assert torch.equal(entry.values, found.entries[name].values), name
    for file in ("loss.csv", "validation.csv"):
        straight = (tmp_path / "straight" / "run_00001" / file).read_text()
        assert (path / file).read_text() == straight

    validate, calls = sara.run.TrainingRun.validate, []

    def stopped(training):
        calls.append(training.step)
        if training.step == 4:
            raise KeyboardInterrupt
        return validate(training)

    monkeypatch.setattr(sara.run.TrainingRun, "validate", stopped)
    with pytest.raises(KeyboardInterrupt):  # within a validation
        run("within")
    monkeypatch.setattr(sara.run.TrainingRun, "validate", validate)
    _, losses_too = run("within", resume=sara.folder.RunFolder(tmp_path / "within" / "run_00001"))
    assert calls == [0, 2, 4]
    assert losses == losses_too

    with pytest.raises(KeyboardInterrupt):
        run("other", stop=3)
    fewer = sara.examples.Examples(latents, captions, None, masks[:6], num_regularisation=4)
    folder = sara.folder.RunFolder(tmp_path / "other" / "run_00001")
    with pytest.raises(ValueError, match="there are 4 regularisation pictures, the run had 3"):
        sara.run.run(sd15, fewer, folder, None, True)
