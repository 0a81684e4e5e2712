"""The host layer against ComfyUI's own model classes, in this process."""

import copy
import dataclasses
import math
import sys
import tempfile

import comfy.sd as comfy
import pytest
import torch

from ..harness.environment import checkpoint
from .models import sd15_unet, write_mini_sd15


@pytest.fixture(scope="module")
def sara():
    """The pack's modules, imported as ComfyUI does."""
    import types

    from sara_pack import sara_core
    from sara_pack.nodes import host
    from sara_pack.nodes.training import examples, run, training_set
    from sara_pack.sara_core.optimizer import eight_bits, learning_rate
    from sara_pack.sara_core.training import run_folder, run_settings

    return types.SimpleNamespace(
        host=host, run=run, sets=training_set, examples=examples, core=sara_core, rate=learning_rate,
        settings=run_settings, folder=run_folder, eight_bits=eight_bits,
    )  # fmt: skip


@pytest.fixture
def sd15(tmp_path):
    write_mini_sd15(tmp_path / "mini.safetensors")
    with torch.inference_mode():
        return comfy.load_diffusion_model(str(tmp_path / "mini.safetensors"))


@pytest.fixture
def emoji64():
    with torch.inference_mode():
        return comfy.load_checkpoint_guess_config(str(checkpoint()), output_vae=False)[0]


def pairs(count, channels=4, size=8, width=768, pooled=None, length=77, seed=0):
    """Random latents and captions, made in inference mode as nodes do."""
    generator = torch.Generator().manual_seed(seed)
    with torch.inference_mode():
        latents = [torch.randn(1, channels, size, size, generator=generator) for _ in range(count)]
        options = (
            {} if pooled is None else {"pooled_output": torch.randn(1, pooled, generator=generator)}
        )
        captions = [
            [torch.randn(1, length, width, generator=generator), dict(options)]
            for _ in range(count)
        ]
    return latents, captions


def settings(sara, **changes):
    options = {
        "steps": 4,
        "batch_size": 2,
        "fraction": 0.05,
        "save_dtype": "fp32",
        "gradient_checkpointing": False,
        **changes,
    }
    return sara.settings.RunSettings(**options)


def train(sara, patcher, latents, captions, settings, resume=None, new=None):
    """Run a training in a folder of its own; returns the delta and the losses."""
    examples = sara.examples.Examples(latents, captions)
    parent = tempfile.mkdtemp()
    folder = resume or new or sara.folder.RunFolder.create(parent, "run", settings)
    path, losses, _ = sara.run.run(patcher, examples, folder, None, resume is not None)
    return sara.core.SparseDelta.load(path), losses["loss"]


def bits(patcher):
    return {n: t.detach().clone() for n, t in patcher.model.diffusion_model.state_dict().items()}


def assert_same_bits(before, patcher):
    after = patcher.model.diffusion_model.state_dict()
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]), name


def raw_output(model, call):
    """Return what the diffusion model itself put out during `call`."""
    seen = []
    hook = model.register_forward_hook(lambda m, i, o: seen.append(o.detach().float()))
    result = call()
    hook.remove()
    return result, seen[0]


def test_loads_as_the_family_it_stands_for(sd15, emoji64, sara):
    assert sara.host.architecture(sd15) == "SD15"
    assert 21e6 < sum(p.numel() for p in sd15.model.diffusion_model.parameters()) < 26e6
    assert sara.host.architecture(emoji64) == "SD3"


def test_epsilon_loss_is_the_error_of_the_predicted_noise(sd15, sara):
    latents, captions = pairs(3)
    with sara.host.trainable(sd15, None) as calls, torch.no_grad():
        data = sara.sets.TrainingSet(calls, sara.examples.Examples(latents, captions))
        assert calls.schedule.prediction == "epsilon"
        clean = data.latents([0, 1, 2])
        scale = sd15.model.latent_format.scale_factor
        assert torch.allclose(clean, torch.cat(latents) * scale)
        sigma = calls.schedule.draw_sigma(3, torch.Generator().manual_seed(0))
        table = sd15.model.model_sampling.sigmas
        assert all((table == s).any() for s in sigma)
        noise = torch.randn(clean.shape)
        noisy = calls.schedule.add_noise(clean, noise, sigma)
        x0, out = raw_output(
            calls.model.diffusion_model, lambda: data.predict(noisy, sigma, [0, 1, 2], [False] * 3)
        )
        loss = calls.schedule.loss(x0, clean, sigma)
    expected = (out - noise).square().flatten(1).mean(1)
    assert torch.allclose(loss, expected, rtol=1e-3)


def test_flow_loss_is_the_error_of_the_velocity_at_the_models_shift(emoji64, sara):
    latents, captions = pairs(2, 16, 8, 4096, pooled=2048)
    with sara.host.trainable(emoji64, None) as calls, torch.no_grad():
        data = sara.sets.TrainingSet(calls, sara.examples.Examples(latents, captions))
        assert (calls.schedule.prediction, calls.schedule.distribution) == ("flow", "logit_normal")
        t = torch.sigmoid(torch.randn(2, generator=torch.Generator().manual_seed(1)))
        sigma = calls.schedule.draw_sigma(2, torch.Generator().manual_seed(1))
        assert torch.allclose(sigma, 3 * t / (1 + 2 * t))  # SD3's shift of 3
        clean = data.latents([0, 1])
        noise = torch.randn(clean.shape)
        noisy = calls.schedule.add_noise(clean, noise, sigma)
        x0, out = raw_output(
            calls.model.diffusion_model, lambda: data.predict(noisy, sigma, [0, 1], [False] * 2)
        )
        loss = calls.schedule.loss(x0, clean, sigma)
    expected = (out - (noise - clean)).square().flatten(1).mean(1)
    assert torch.allclose(loss, expected, rtol=1e-3)


def test_noise_is_mixed_as_comfyui_does(sd15, emoji64, sara):
    for patcher, channels in ((sd15, 4), (emoji64, 16)):
        schedule = sara.host.noise_schedule(patcher)
        latents, noise = torch.randn(2, 2, channels, 4, 4)
        sigma = schedule.draw_sigma(2, torch.Generator().manual_seed(0))
        expected = patcher.model.model_sampling.noise_scaling(sigma, noise.clone(), latents)
        assert torch.allclose(schedule.add_noise(latents, noise, sigma), expected)


@pytest.mark.parametrize(
    ("base", "table", "prediction", "distribution"),
    [
        ("V_PREDICTION", "ModelSamplingDiscrete", "v", "uniform"),
        ("EDM", "ModelSamplingContinuousEDM", "edm", "log_normal"),
        ("X0", "ModelSamplingDiscrete", "x0", "uniform"),
        ("CONST", "ModelSamplingFlux", "flow", "logit_normal"),
        ("COSMOS_RFLOW", "ModelSamplingCosmosRFlow", "cosmos_flow", "logit_normal"),
    ],
)
def test_every_parametrisation_agrees_with_comfyuis_denoiser(
    sd15, sara, base, table, prediction, distribution
):
    import comfy.model_sampling as sampling

    kind = type("Sampling", (getattr(sampling, table), getattr(sampling, base)), {})
    patcher = sd15.clone()
    patcher.add_object_patch("model_sampling", kind())
    schedule = sara.host.noise_schedule(patcher)
    assert (schedule.prediction, schedule.distribution) == (prediction, distribution)
    model_sampling = patcher.get_model_object("model_sampling")
    sigma = schedule.draw_sigma(6, torch.Generator().manual_seed(0))
    assert (sigma > 0).all()
    latents, noise, out, other = torch.randn(4, 6, 4, 3, 3, dtype=torch.float64)
    noisy = schedule.add_noise(latents, noise, sigma)
    expected = model_sampling.noise_scaling(sigma, noise.clone(), latents)
    assert torch.allclose(noisy, expected)
    # Two outputs that differ by d give losses as if d were the error of the prediction itself.
    x0 = model_sampling.calculate_denoised(sigma, out, noisy)
    near = model_sampling.calculate_denoised(sigma, other, noisy)
    found = schedule.loss(near, x0, sigma)
    assert torch.allclose(found.double(), (other - out).square().flatten(1).mean(1), rtol=1e-3)


def test_a_sampling_that_cannot_be_trained_is_refused(sd15, sara):
    import comfy.model_sampling as sampling

    kind = type("Sampling", (sampling.ModelSamplingDiscrete, sampling.IMG_TO_IMG), {})
    patcher = sd15.clone()
    patcher.add_object_patch("model_sampling", kind())
    with pytest.raises(ValueError, match="IMG_TO_IMG.* cannot be trained"):
        sara.host.noise_schedule(patcher)


def test_a_batch_is_each_picture_with_its_own_caption_and_noise_level(sd15, sara):
    latents, captions = pairs(3)
    captions[1] = pairs(1, length=154, seed=5)[1][0]  # a longer caption in the same batch
    empty = pairs(1, seed=9)[1][0]
    with sara.host.trainable(sd15, None) as calls, torch.no_grad():
        data = sara.sets.TrainingSet(calls, sara.examples.Examples(latents, captions, empty))
        clean, sigma = data.latents([0, 1, 2]), torch.tensor([0.5, 2.0, 8.0])
        together = data.predict(clean, sigma, [0, 1, 2], [False, False, True])
        model = calls.model
        chosen = [captions[0], captions[1], empty]
        for i, (context, _) in enumerate(chosen):
            alone = model.apply_model(
                clean[i : i + 1], sigma[i : i + 1], c_crossattn=context.clone(),
                transformer_options={},
            )  # fmt: skip
            assert torch.allclose(together[i : i + 1], alone, atol=1e-4), i


def test_weights_moved_outside_inference_mode_train(sd15, sara):
    """What Module.to does to a model that goes to the GPU for the first time."""
    latents, captions = pairs(2)
    sd15.model._apply(lambda t: t.to(torch.float64).to(torch.float32))
    weight = sd15.model.diffusion_model.out[2].weight
    with pytest.raises(RuntimeError, match="version counter"):
        _ = weight._version
    assert not weight.is_inference()
    delta, _ = train(sara, sd15, latents, captions, settings(sara, steps=1))
    assert delta.num_values > 0


def test_adapters_can_be_copied_as_newer_versions_do(sd15, sara):
    weight = torch.tensor([[0.1, 2.0], [-0.2, 3.0]])
    entry = sara.core.DeltaEntry(torch.tensor([1, 2], dtype=torch.int32), torch.ones(2), (2, 2))
    for adapter, expected in (
        (sara.host.SparseAdapter(set(), [entry.index, entry.values]), [[0.1, 2.5], [0.3, 3.0]]),
        (sara.host.ZeroSmallWeights(set(), [0.15]), [[0.0, 2.0], [-0.2, 3.0]]),
    ):
        copied = type(adapter)(adapter.loaded_keys, adapter.weights)
        found = copied.calculate_weight(weight.clone(), "k", 0.5, 1.0, None, lambda a: a)
        assert torch.allclose(found, torch.tensor(expected))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_returns_the_base_bit_for_bit_and_the_delta_is_what_was_learned(
    sd15, sara, checkpointing
):
    latents, captions = pairs(4)
    before, flags = bits(sd15), [p.requires_grad for p in sd15.model.parameters()]
    trained = {}
    original = sara.core.SaraAdamW.restore
    noisy, sigma = torch.cat(latents).clone(), torch.tensor([0.5, 1.0, 2.0, 4.0])
    context = torch.cat([c[0] for c in captions]).clone()

    def output():
        with torch.no_grad():
            return sd15.model.apply_model(noisy, sigma, c_crossattn=context, transformer_options={})

    def keep(optimizer):
        trained.update(bits(sd15))
        trained["output"] = output()
        original(optimizer)

    base_output = output()
    sara.core.SaraAdamW.restore = keep
    try:
        delta, losses = train(sara, sd15, latents, captions, settings(sara, learning_rate=1e-3, gradient_checkpointing=checkpointing))  # fmt: skip
    finally:
        sara.core.SaraAdamW.restore = original
    assert len(losses) == 4
    assert_same_bits(before, sd15)
    assert [p.requires_grad for p in sd15.model.parameters()] == flags
    assert not any(m.training for m in sd15.model.diffusion_model.modules())
    assert not any("forward" in m.__dict__ for m in sd15.model.modules())

    applied = sara.host.apply_delta(sd15, delta, 1.0)
    import comfy.model_management

    with torch.inference_mode():
        comfy.model_management.load_models_gpu([applied])
        changed = 0
        for name, tensor in applied.model.diffusion_model.state_dict().items():
            assert torch.allclose(tensor, trained[name], rtol=0, atol=1e-7), name
            changed += int((tensor != before[name]).sum())
        assert changed > 0.9 * delta.num_values
        change = (trained["output"] - base_output).norm()
        assert (output() - trained["output"]).norm() < 1e-4 * change
        comfy.model_management.load_models_gpu([sd15])
    assert_same_bits(before, sd15)


def test_checkpointing_does_not_change_the_result(sd15, sara):
    latents, captions = pairs(4)
    one, two = (
        train(sara, sd15, latents, captions, settings(sara, gradient_checkpointing=on))[0]
        for on in (False, True)
    )  # fmt: skip
    for name, entry in one.entries.items():
        assert torch.equal(entry.values, two.entries[name].values), name


@pytest.mark.parametrize("when", ["forward", "report"])
def test_an_error_or_cancel_leaves_the_model_as_it_was(sd15, sara, when, monkeypatch):
    import comfy.model_management as management

    latents, captions = pairs(4)
    before = bits(sd15)
    count = [0]

    def fail(*_, **__):
        count[0] += 1
        if count[0] == 3:
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
        if count[0] > 5:  # the first pass only looks for changes in place
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
    hook = sd15.model.diffusion_model.register_forward_hook(fail_at(3))
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


def fail_at(call):
    count = [0]

    def fail(*_):
        count[0] += 1
        if count[0] == call:
            raise KeyboardInterrupt

    return fail


def test_broken_pictures_are_left_out_and_only_broken_ones_end_the_run(sd15, sara, tmp_path):
    latents, captions = pairs(4)
    with torch.inference_mode():
        latents[2] = latents[2] * float("nan")
    before = bits(sd15)
    delta, losses = train(sara, sd15, latents, captions, settings(sara, steps=4, batch_size=1))
    assert sum(loss != loss for loss in losses) == 1
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


def test_a_finished_run_goes_on_with_more_steps_on_a_course_of_their_own(
    sd15, sara, tmp_path, monkeypatch
):
    monkeypatch.setattr(sara.host, "output_root", lambda: str(tmp_path))
    latents, captions = pairs(4)
    options = settings(sara, steps=4, learning_rate=1e-3, output_name="run", progressive=0.5)
    first, _ = train(sara, sd15, latents, captions, None, new=sara.run.new_folder(options))
    more = dataclasses.replace(options, learning_rate=5e-4, lr_schedule="linear")

    again = sara.run.old_folder("run_00001", more, 0)
    assert sara.run.is_finished(again)  # no more steps: what it has learned is put out
    again.close()
    folder = sara.run.old_folder("run_00001", more, 2)
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

    (folder.path / "state.safetensors").unlink()
    with pytest.raises(
        ValueError, match="its state was not kept, so it cannot be given more steps"
    ):
        sara.run.old_folder("run_00001", more, 2)


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


def test_training_needs_no_second_copy_of_the_weights(sd15, sara):
    latents, captions = pairs(2)
    sizes = []

    def look(module, inputs, output):
        import gc

        gc.collect()
        seen = {}
        for item in gc.get_objects():
            if type(item) in (torch.Tensor, torch.nn.Parameter) and item.numel() >= 1_000_000:
                seen[item.data_ptr()] = item.numel()
        sizes.append(sum(seen.values()))

    hook = sd15.model.diffusion_model.out.register_forward_hook(look)
    train(sara, sd15, latents, captions, settings(sara, steps=1))
    hook.remove()
    large = sum(
        p.numel() for p in sd15.model.diffusion_model.parameters() if p.numel() >= 1_000_000
    )
    assert sizes[0] <= 1.3 * large


def test_deltas_and_loras_stack_in_any_order_and_unload_exactly(sd15, sara):
    import comfy.lora
    import comfy.model_management as management

    key = "input_blocks.1.1.transformer_blocks.0.ff.net.0.proj.weight"
    base = bits(sd15)
    generator = torch.Generator().manual_seed(3)
    shape = tuple(base[key].shape)
    deltas = []
    for _ in range(2):
        index = torch.randperm(base[key].numel(), generator=generator)[:5000].sort().values.int()
        values = torch.randn(5000, generator=generator) * 1e-2
        deltas.append(sara.core.SparseDelta({key: sara.core.DeltaEntry(index, values, shape)}))
    up, down = (
        torch.randn(shape[0], 4, generator=generator),
        torch.randn(4, shape[1], generator=generator),
    )
    lora = {"lora_unet_x.lora_up.weight": up, "lora_unet_x.lora_down.weight": down}
    patches = comfy.lora.load_lora(lora, {"lora_unet_x": "diffusion_model." + key})

    def add_lora(patcher):
        patched = patcher.clone()
        assert patched.add_patches(patches, 0.01)
        return patched

    steps = [
        lambda p: sara.host.apply_delta(p, deltas[0], 0.7),
        lambda p: sara.host.apply_delta(p, deltas[1], -1.5),
        add_lora,
    ]
    expected = base[key].clone()
    for delta, strength in zip(deltas, (0.7, -1.5), strict=True):
        entry = delta.entries[key]
        expected.view(-1).index_add_(0, entry.index, strength * entry.values)
    expected += 0.01 * (up @ down)
    for order in ((0, 1, 2), (2, 1, 0), (1, 2, 0)):
        patched = sd15
        for i in order:
            patched = steps[i](patched)
        with torch.inference_mode():
            management.load_models_gpu([patched])
            found = patched.model.diffusion_model.state_dict()[key]
            assert torch.allclose(found, expected, atol=1e-6), order
            management.load_models_gpu([sd15])
        assert_same_bits(base, sd15)


def test_strength_zero_adds_no_patch(sd15, sara):
    key = "time_embed.0.weight"
    entry = sara.core.DeltaEntry(
        torch.tensor([0, 5], dtype=torch.int32), torch.ones(2), (1280, 320)
    )
    patched = sara.host.apply_delta(sd15, sara.core.SparseDelta({key: entry}), 0.0)
    assert patched.patches == {}
    assert patched is not sd15


def test_half_precision_bases_train_and_apply(tmp_path, sara):
    import comfy.model_management as management

    state = write_mini_sd15(tmp_path / "mini.safetensors")
    latents, captions = pairs(2, size=4)
    for dtype in (torch.float16, torch.bfloat16):
        with torch.inference_mode():
            patcher = comfy.load_diffusion_model(
                str(tmp_path / "mini.safetensors"), model_options={"dtype": dtype}
            )
        assert patcher.model.get_dtype() == dtype
        before = bits(patcher)
        changes = settings(
            sara, steps=1, include="time_embed, out.2", learning_rate=1e-3, fraction=0.2
        )
        delta, losses = train(sara, patcher, latents, captions, changes)
        assert_same_bits(before, patcher)
        assert all(torch.isfinite(torch.tensor(losses)))
        assert all(e.values.dtype == torch.float32 for e in delta.entries.values())
        assert all((e.values != 0).float().mean() > 0.9 for e in delta.entries.values())
        applied = sara.host.apply_delta(patcher, delta, 1.0)
        with torch.inference_mode():
            management.load_models_gpu([applied])
            found = applied.model.diffusion_model.state_dict()["out.2.weight"]
        entry = delta.entries["out.2.weight"]
        expected = state["out.2.weight"].to(dtype).float().view(-1)
        expected = expected.index_add(0, entry.index, entry.values).to(dtype)
        assert torch.equal(found.flatten(), expected)


def test_wrong_inputs_are_explained(sd15, sara):
    latents, captions = pairs(2)
    bad, _ = pairs(2, channels=16)
    with pytest.raises(ValueError, match=r"16 channels but this SD15\s+model takes 4"):
        train(sara, sd15, bad, captions, settings(sara))
    with pytest.raises(ValueError, match="3 pictures but 2 captions"):
        sara.examples.flatten_conditioning([captions], 3)
    masked = [[captions[0][0], {"mask": torch.ones(1, 8, 8)}], captions[1]]
    with pytest.raises(ValueError, match="carries mask"):
        train(sara, sd15, latents, masked, settings(sara))
    with pytest.raises(ValueError, match="rule .* gives"):
        train(sara, sd15, latents, captions, settings(sara, threshold=0.1))


def test_lists_batches_and_single_captions_are_flattened(sara):
    latents = [{"samples": torch.zeros(3, 4, 8, 8)}, {"samples": torch.ones(1, 4, 8, 16)}]
    flat = sara.examples.flatten_latents(latents)
    assert [tuple(t.shape) for t in flat] == [(1, 4, 8, 8)] * 3 + [(1, 4, 8, 16)]
    _, captions = pairs(2)
    assert sara.examples.flatten_conditioning([[captions[0]], [captions[1]]], 2) == captions
    assert sara.examples.flatten_conditioning([captions], 2) == captions
    assert sara.examples.flatten_conditioning([[captions[0]]], 2) == [captions[0]] * 2


def test_zeroing_zeroes_exactly_the_selected_weights(sd15, sara):
    import comfy.model_management as management

    weights = sara.host.base_weights(sd15)
    names = [name for name, w in weights.items() if w.dim() > 1]
    before = bits(sd15)
    zeroed = sara.host.zero_small_weights(sd15, names, 0.005)
    with torch.inference_mode():
        management.load_models_gpu([zeroed])
        found = zeroed.model.diffusion_model.state_dict()
        for name, tensor in before.items():
            small = (tensor.abs() < 0.005) if name in names else torch.zeros_like(tensor).bool()
            assert torch.equal(found[name], torch.where(small, 0, tensor)), name
        management.load_models_gpu([sd15])
    assert_same_bits(before, sd15)


def test_base_weights_are_seen_through_loaded_patches(sd15, sara):
    import comfy.model_management as management

    before = bits(sd15)
    zeroed = sara.host.zero_small_weights(sd15, ["time_embed.0.weight"], 1.0)
    with torch.inference_mode():
        management.load_models_gpu([zeroed])
        assert not zeroed.model.diffusion_model.time_embed[0].weight.any()
        seen = sara.host.base_weights(zeroed)
        assert torch.equal(seen["time_embed.0.weight"], before["time_embed.0.weight"])
        assert len(seen) == len(list(sd15_unet().parameters()))
        management.load_models_gpu([sd15])


def test_training_leaves_the_callers_patcher_alone(sd15, sara):
    options = copy.deepcopy(sd15.model_options)
    latents, captions = pairs(2)
    train(sara, sd15, latents, captions, settings(sara, steps=1))
    assert sd15.model_options == options
    assert sd15.patches == {}
    assert sd15.object_patches == {}


def test_windows_of_a_picture_are_held_out_together(sara):
    latents = [
        {"samples": torch.randn(1, 4, 8, 8), "sara_picture": f"p{i // 3}"} for i in range(30)
    ]
    latents += latents[:6]  # repeats
    captions = [[[torch.randn(1, 5, 7), {}]] for _ in latents]
    examples = sara.examples.gather_examples(latents, captions, None, None, None, None)
    training, held_out = sara.examples.split_validation(examples, 0.3, seed=4)
    names = [examples.names[i] for i in training]
    kept_back = [examples.names[i] for i in held_out]
    assert len(set(kept_back)) == 3
    assert len(held_out) == 9  # each window once
    assert not set(names) & set(kept_back)
    assert set(names) | set(kept_back) == {f"p{i}" for i in range(10)}
    assert sara.examples.split_validation(examples, 0.3, seed=4) == (training, held_out)
    assert sara.examples.split_validation(examples, 0.3, seed=5)[1] != held_out
    assert sara.examples.split_validation(examples, 0.0, seed=4) == (list(range(36)), [])
    one = sara.examples.gather_examples(latents[:3], captions[:3], None, None, None, None)
    with pytest.raises(ValueError, match="at least two pictures"):
        sara.examples.split_validation(one, 0.5, 0)


def test_masks_reach_the_loss_at_the_latents_size(sd15, sara):
    latents, captions = pairs(3)
    masks = [torch.zeros(1, 64, 64), torch.ones(1, 8, 8), torch.rand(1, 16, 16)]
    masks[0][:, :32] = 1
    with sara.host.trainable(sd15, None) as calls:
        pictures = sara.sets.TrainingSet(
            calls, sara.examples.Examples(latents, captions, masks=masks)
        )
        mask = pictures.mask([0, 1, 2])
    assert mask.shape == (3, 1, 8, 8)
    assert torch.equal(mask[0, 0], torch.tensor([[1.0] * 8] * 4 + [[0.0] * 8] * 4))
    assert torch.equal(mask[1, 0], torch.ones(8, 8))
    by_hand = masks[2][0].reshape(8, 2, 8, 2).mean((1, 3))
    assert torch.allclose(mask[2, 0], by_hand)
    with pytest.raises(ValueError, match="3 pictures but 2 masks"):
        sara.examples.flatten_masks(masks[:2], 3)


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


def test_moments_in_eight_bits_learn_nearly_the_same(sd15, sara):
    latents, captions = pairs(4)
    options = settings(sara, steps=20, learning_rate=1e-4, exclude="")
    expected, losses = train(sara, sd15, latents, captions, options)
    in_eight_bits = dataclasses.replace(options, moments="8bit")
    found, losses_too = train(sara, sd15, latents, captions, in_eight_bits)
    assert losses == pytest.approx(losses_too, rel=0.01)
    one, two = (
        torch.cat([entry.values for entry in delta.entries.values()]) for delta in (expected, found)
    )
    assert not torch.equal(one, two)
    assert ((one - two).norm() / one.norm()).item() < 0.1


def test_moments_in_eight_bits_without_torchao_are_refused_before_anything_runs(sara, monkeypatch):
    from sara_pack.nodes.training.train import SaraTrain

    assert SaraTrain.validate_inputs(["new run"], ["8bit"]) is True
    sara.eight_bits._map.cache_clear()
    monkeypatch.setitem(sys.modules, "torchao.optim.quant_utils", None)
    assert "pip install -U torchao" in SaraTrain.validate_inputs(["new run"], ["8bit"])
    assert SaraTrain.validate_inputs(["new run"]) is True
    assert SaraTrain.validate_inputs([None], [None]) is True  # linked
    assert "expected one of fp32, 8bit" in SaraTrain.validate_inputs(["new run"], ["4bit"])


class Offloaded:
    """Has ComfyUI leave all weights where they wait, as on a graphics card with little memory.

    There is no second device here, so that a weight's way to it is a copy that is made each time.
    """

    def __init__(self, monkeypatch):
        import comfy.model_management as management

        self.full_loads, self.copied, self.largest = [], 0, 0
        self._copies, self._load, self._cast = [], management.load_models_gpu, management.cast_to
        self._management = management
        monkeypatch.setattr(management, "load_models_gpu", self.load)
        monkeypatch.setattr(management, "NUM_STREAMS", 2)

    def load(self, models, force_full_load=False, **options):
        self._load(models, force_full_load=force_full_load, **options)
        self.full_loads.append(force_full_load)
        if not force_full_load:
            for patcher in models:
                patcher.detach()
                patcher.patch_model(torch.device("cpu"), lowvram_model_memory=1)

    def cast(
        self, weight, dtype=None, device=None, non_blocking=False, copy=False, stream=None, **_
    ):
        assert stream is None
        assert self._management.NUM_STREAMS == 0
        copied = self._cast(weight, dtype, device, non_blocking, True)
        self._copies = [held for held in self._copies if not held[0].expired()]
        reference = torch.multiprocessing.reductions.StorageWeakRef(copied.untyped_storage())
        self._copies.append((reference, copied.nbytes))
        self.copied += 1
        self.largest = max(self.largest, sum(size for _, size in self._copies))
        return copied


@pytest.mark.parametrize("dtype", ["auto", "bf16"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_offloaded_weights_train_to_the_same_and_no_copies_pile_up(
    sd15, sara, monkeypatch, checkpointing, dtype
):
    latents, captions = pairs(2)
    before = bits(sd15)
    options = settings(sara, steps=2, batch_size=1, fraction=0.1, learning_rate=1e-3, exclude="",
                       training_dtype=dtype, gradient_checkpointing=checkpointing)  # fmt: skip
    expected, _ = train(sara, sd15, latents, captions, options)
    watch = Offloaded(monkeypatch)
    monkeypatch.setattr(watch._management, "cast_to", watch.cast)
    delta, _ = train(sara, sd15, latents, captions, dataclasses.replace(options, offloading=True))
    assert watch.full_loads == [False]
    assert watch._management.NUM_STREAMS == 2
    assert watch.copied > 100
    for name, entry in expected.entries.items():
        assert torch.equal(entry.values, delta.entries[name].values), name
    largest_block = 0.2 if checkpointing else 0.1  # one block is made again as a whole
    assert watch.largest < largest_block * sum(tensor.nbytes for tensor in before.values())
    monkeypatch.undo()
    assert_same_bits(before, sd15)
