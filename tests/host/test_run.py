"""A run in this process: what it learns, what it leaves alone, what it refuses."""

import copy
import dataclasses
import weakref

import pytest
import torch

from .builders import assert_same_bits, bits, pairs, settings, train


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


def test_wrong_inputs_are_explained(sd15, sara):
    latents, captions = pairs(2)
    bad, _ = pairs(2, channels=16)
    with pytest.raises(ValueError, match=r"16 channels but this SD15\s+model takes 4"):
        train(sara, sd15, bad, captions, settings(sara))
    with pytest.raises(ValueError, match="3 pictures but 2 captions"):
        sara.examples.flatten_conditioning([captions], [{"samples": torch.zeros(3, 4, 8, 8)}])
    masked = [[captions[0][0], {"mask": torch.ones(1, 8, 8)}], captions[1]]
    with pytest.raises(ValueError, match="carries mask"):
        train(sara, sd15, latents, masked, settings(sara))


def test_the_rule_gives_a_rate_for_large_weights_too(sd15, sara, tmp_path):
    options = settings(sara, steps=1, threshold=0.1, learning_rate=0.0)
    folder = sara.folder.RunFolder.create(tmp_path, "run", options)
    train(sara, sd15, *pairs(2), None, new=folder)
    ((_, rate),) = sara.folder.RunFolder(folder.path).read_losses(1)
    assert rate == pytest.approx(1.738e-4, rel=1e-3)


def test_lists_batches_and_single_captions_are_flattened(sara):
    latents = [{"samples": torch.zeros(3, 4, 8, 8)}, {"samples": torch.ones(1, 4, 8, 16)}]
    flat = sara.examples.flatten_latents(latents)
    assert [tuple(t.shape) for t in flat] == [(1, 4, 8, 8)] * 3 + [(1, 4, 8, 16)]
    _, captions = pairs(2)
    flattened, two = sara.examples.flatten_conditioning, [{"samples": torch.zeros(2, 4, 8, 8)}]
    assert flattened([[captions[0]], [captions[1]]], two) == captions
    assert flattened([captions], two) == captions
    assert flattened([[captions[0]]], two) == [captions[0]] * 2
    # A caption for each batch, as where a sampler goes over a list of prompts.
    assert flattened([[captions[0]], [captions[1]]], latents) == [captions[0]] * 3 + [captions[1]]
    with pytest.raises(ValueError, match="4 pictures in 2 batches but 3 captions are connected"):
        flattened([captions, [captions[0]]], latents)


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


def test_what_a_module_keeps_from_step_to_step_is_dropped(sd15, sara, monkeypatch):
    """ComfyUI 0.33 lets modules keep tensors between steps; a gradient must not come along."""
    import comfy.model_management as management

    keepers = weakref.WeakSet()
    monkeypatch.setattr(management, "CROSS_STEP_STATE", keepers, raising=False)
    block, found = sd15.model.diffusion_model.out, []

    def keep(module, inputs, output):
        found.append(hasattr(module, "_comfy_cross_step_state"))
        module._comfy_cross_step_state = output
        keepers.add(module)

    hook = block.register_forward_hook(keep)
    train(sara, sd15, *pairs(2), settings(sara, steps=3, batch_size=1))
    hook.remove()
    assert len(found) >= 3
    assert not any(found)


def test_each_layer_trains_the_same_share_unless_the_model_is_asked_for(sd15, sara):
    latents, captions = pairs(2)
    options = settings(sara, fraction=0.1, steps=2, progressive=0)
    delta, _ = train(sara, sd15, latents, captions, options)
    for name, entry in delta.entries.items():
        count = torch.Size(entry.shape).numel()
        assert len(entry.index) == max(1, round(0.1 * count)), name
    assert "sara.threshold" not in delta.metadata
    options = dataclasses.replace(options, select_from="model")
    of_all, _ = train(sara, sd15, latents, captions, options)
    below = float(of_all.metadata["sara.threshold"])
    for name, weight in sd15.model.diffusion_model.named_parameters():
        if weight.dim() > 1:
            expected = int((weight.detach().abs() < below).sum())
            entry = of_all.entries.get(name)
            assert (len(entry.index) if entry else 0) == expected, name
