"""Deltas as patches of a MODEL in this process."""

import comfy.sd as comfy
import pytest
import torch

from .builders import assert_same_bits, bits, pairs, settings, train
from .models import sd15_unet, write_mini_sd15


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


def of_merge(sd15, tmp_path):
    """Half the miniature, half another one; and the same merge as it would be saved."""
    import comfy.sd
    from comfy_extras.nodes_model_merging import ModelMergeSimple

    write_mini_sd15(tmp_path / "other.safetensors", seed=1)
    with torch.inference_mode():
        other = comfy.sd.load_diffusion_model(str(tmp_path / "other.safetensors"))
        (merged,) = ModelMergeSimple().merge(sd15, other, 0.5)
        halves = zip(bits(sd15).items(), bits(other).values(), strict=True)
        saved = {name: 0.5 * one + 0.5 * two for (name, one), two in halves}
    return merged, saved


def test_what_analyze_shows_and_train_trains_are_the_patched_weights(sd15, sara, tmp_path):
    from sara_pack.nodes.analysis.analyze import SaraAnalyze

    merged, saved = of_merge(sd15, tmp_path)
    seen = sara.host.patched_weights(merged)
    for name, weight in seen.items():
        assert torch.allclose(weight, saved[name], atol=1e-7), name
    hidden = type("Hidden", (), {"unique_id": None, "extra_pnginfo": None})
    node = type("Node", (SaraAnalyze,), {"hidden": hidden})
    threshold = node.execute(merged, 0.0, 0.1, "", "", "", "auto").args[1]
    trainable = sara.host.trainable_weights(merged)
    magnitudes = torch.cat(
        [saved[name].abs().flatten() for name in trainable if saved[name].dim() > 1]
    )
    expected = magnitudes.sort().values[round(0.1 * len(magnitudes))].item()
    assert threshold == pytest.approx(expected, rel=1e-3)
    assert node.execute(sd15, 0.0, 0.1, "", "", "", "auto").args[1] != pytest.approx(
        threshold, rel=0.01
    )

    before = {name: weight.clone() for name, weight in sara.host.base_weights(sd15).items()}
    delta, _ = train(sara, merged, *pairs(2), settings(sara, threshold=threshold))
    after = sara.host.base_weights(merged)
    assert all(torch.equal(weight, after[name]) for name, weight in before.items())
    assert float(delta.metadata["sara.threshold"]) == threshold
    assert delta.num_values == int((magnitudes < threshold).sum())
    assert delta.fits_base(saved)
    assert not delta.fits_base(sara.host.base_weights(sd15))
    assert delta.metadata["sara.patches_below"].startswith("merge on ")


def test_a_delta_trained_above_a_patch_fits_the_model_with_that_patch(sd15, sara, tmp_path, caplog):
    merged, _ = of_merge(sd15, tmp_path)
    delta, _ = train(sara, merged, *pairs(2), settings(sara))
    with caplog.at_level("WARNING"):
        sara.host.apply_delta(merged, delta, 1.0)
        assert "another base" not in caplog.text
        sara.host.apply_delta(sd15, delta, 1.0)
        assert "another base" in caplog.text
    plain, _ = train(sara, sd15, *pairs(2), settings(sara))
    assert "sara.patches_below" not in plain.metadata
    caplog.clear()
    with caplog.at_level("WARNING"):  # of the checkpoint, with the merge beside it
        sara.host.apply_delta(merged, plain, 1.0)
        assert "another base" not in caplog.text
