"""Deltas beside what else changes a model, through the executor; each compared by value."""

import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from sara_core import SparseDelta

from ..harness.server import PromptError
from .graphs import Graph, saved_latents, saved_weights
from .scene import STEPS, Scene, same


def test_a_hook_is_the_applied_delta_where_and_when_it_is_on(server, deltas):
    scene = Scene(server)
    graph, base, applied = scene.graph, scene.base, scene.applied(strength=0.8)

    def hooked(*keyframes):
        hooks, frame = graph("SaraCreateHook", delta=scene.delta(), strength=0.8), None
        for start, strength in keyframes:
            previous = {} if frame is None else {"prev_hook_kf": frame}
            frame = graph("CreateHookKeyframe", start_percent=start, strength_mult=strength, **previous)  # fmt: skip
        if frame is not None:
            hooks = graph("SetHookKeyframes", hooks=hooks, hook_kf=frame)
        return graph("ConditioningSetProperties", cond_NEW=scene.text, hooks=hooks)

    scene.sample("k_base", base)
    scene.sample("k_applied", applied)
    scene.sample("k_hook", base, hooked())
    scene.sample("k_off", base, hooked((0.0, 0.0)))
    scene.sample("k_half_strength", base, hooked((0.0, 0.5)))
    scene.sample("k_half_applied", scene.applied(strength=0.4))
    scene.sample("k_first", base, hooked((0.0, 1.0), (0.5, 0.0)))
    # The same by hand: the first steps with the model applied, the others with the base.
    first = scene.sample("k_a", applied, add_noise="enable", start_at_step=0, end_at_step=2,
                         return_with_leftover_noise="enable")  # fmt: skip
    scene.sample("k_by_hand", base, latent=first, add_noise="disable", start_at_step=2,
                 end_at_step=STEPS, return_with_leftover_noise="disable")  # fmt: skip
    graph.run()
    assert not same(server, "k_base", "k_applied", 0.05)
    assert same(server, "k_hook", "k_applied")
    assert same(server, "k_off", "k_base")
    assert same(server, "k_half_strength", "k_half_applied")
    assert same(server, "k_first", "k_by_hand")
    assert not same(server, "k_first", "k_applied", 1e-3)


def test_a_hook_on_one_region_changes_that_region_as_the_delta_does(server, deltas):
    picture = Image.new("L", (64, 64), 0)
    picture.paste(255, (0, 0, 32, 64))
    picture.convert("RGB").save(server.base / "input" / "left.png")
    scene = Scene(server)
    graph = scene.graph
    left = graph("LoadImageMask", image="left.png", channel="red")
    right = graph("InvertMask", mask=left)
    hooks = graph("SaraCreateHook", delta=scene.delta(), strength=1.0)
    one = graph("ConditioningSetProperties", cond_NEW=scene.text, hooks=hooks, mask=left)
    both = graph("ConditioningSetPropertiesAndCombine", cond=one, cond_NEW=scene.text, mask=right)
    scene.sample("r_base", scene.base, steps=1)
    scene.sample("r_applied", scene.applied(), steps=1)
    scene.sample("r_both", scene.base, both, steps=1)
    graph.run()
    base, applied, found = (saved_latents(server, n) for n in ("r_base", "r_applied", "r_both"))
    half = found.shape[-1] // 2
    assert torch.allclose(found[..., :half], applied[..., :half], atol=1e-4)
    assert torch.allclose(found[..., half:], base[..., half:], atol=1e-4)
    assert not torch.allclose(applied, base, atol=0.05)


def test_a_hook_refuses_another_model(server, deltas):
    scene = Scene(server)
    hooks = scene.graph("SaraCreateHook", delta=scene.delta("mini"), strength=1.0)
    scene.sample("x", scene.base, scene.graph("ConditioningSetProperties", cond_NEW=scene.text, hooks=hooks))  # fmt: skip
    with pytest.raises(PromptError, match="does not fit the SD3 model"):
        scene.graph.run()


def test_strengths_of_blocks_deltas_and_signs_add_up(server, deltas):
    scene = Scene(server)
    graph = scene.graph
    blocks = graph("SaraBlockStrengths", delta=scene.delta(), strengths="joint_blocks.*: 0.5", others=0.0)  # fmt: skip
    graph("ModelSave", model=scene.applied(delta=blocks), filename_prefix="weights/b_blocks")
    graph("PreviewAny", source=blocks.out(1))
    strengths = {"one": 0.5, "two": -1.5, "three": 0.25}
    orders = (("one", "two", "three"), ("three", "one", "two"), ("two", "one"))
    for number, order in enumerate(orders):
        model = scene.base
        for name in order:
            model = scene.applied(model, name, strengths[name])
        graph("ModelSave", model=model, filename_prefix=f"weights/b_order{number}")
    graph("ModelSave", model=scene.base, filename_prefix="weights/b_base")
    outputs = graph.run()
    base, found = (saved_weights(server, n) for n in ("b_base", "b_blocks"))
    folder = server.base / "models" / "sara"
    loaded = {name: SparseDelta.load(folder / f"{name}.safetensors") for name in strengths}
    one = loaded["one"]

    def expected(*parts):
        weights = {key: weight.clone() for key, weight in base.items()}
        for delta, strength in parts:
            for name, entry in delta.entries.items():
                key = next(k for k in weights if k.endswith(name))
                flat = weights[key].view(-1)
                flat[entry.index.long()] += strength * entry.values
        return weights

    inside = SparseDelta({n: e for n, e in one.entries.items() if n.startswith("joint_blocks")})
    assert 0 < len(inside.entries) < len(one.entries)
    for key, weight in expected((inside, 0.5)).items():
        assert torch.allclose(found[key], weight, atol=1e-6), key
    for number, order in enumerate(orders):
        found = saved_weights(server, f"b_order{number}")
        parts = [(loaded[name], strengths[name]) for name in order]
        for key, weight in expected(*parts).items():
            assert torch.allclose(found[key], weight, atol=1e-6), key
    text = next(o["text"] for o in outputs.values() if "text" in o)[0]
    assert "joint_blocks.0: 0.5" in text
    assert "final_layer: 0" in text


def test_merges_and_saved_checkpoints_hold_the_delta(server, deltas):
    scene = Scene(server)
    graph = scene.graph
    applied = scene.applied()
    scene.sample("m_applied", applied)
    scene.sample("m_half", scene.applied(strength=0.5))
    merged = graph("ModelMergeSimple", model1=applied, model2=scene.base, ratio=0.5)
    scene.sample("m_merged", merged)
    difference = graph("ModelMergeSubtract", model1=applied, model2=scene.base, multiplier=1.0)
    scene.sample("m_added", graph("ModelMergeAdd", model1=scene.base, model2=difference))
    graph("CheckpointSave", model=applied, clip=scene.checkpoint.out(1), vae=scene.checkpoint.out(2),
          filename_prefix="checkpoints/with_delta")  # fmt: skip
    graph.run()
    (saved,) = (server.base / "output" / "checkpoints").glob("with_delta_*.safetensors")
    shutil.copy(saved, server.base / "models" / "checkpoints" / "with_delta.safetensors")
    scene = Scene(server)
    reloaded = scene.graph("CheckpointLoaderSimple", ckpt_name="with_delta.safetensors")
    scene.sample("m_reloaded", scene.graph("ModelSamplingSD3", model=reloaded, shift=1.0))
    scene.graph.run()
    assert same(server, "m_merged", "m_half", 1e-4)
    assert same(server, "m_added", "m_applied", 1e-4)
    assert same(server, "m_reloaded", "m_applied", 1e-4)


def test_a_delta_beside_a_controlnet_is_the_merged_model_beside_it(server, deltas):
    write_mini_controlnet(server.base / "models" / "controlnet" / "mini.safetensors")

    def picture(graph, model, name, control=True):
        clip = graph("CLIPLoader", clip_name="clip_l.safetensors", type="stable_diffusion")
        text = graph("CLIPTextEncode", clip=clip, text="3d strawberry")
        positive, negative = text, text
        if control:
            net = graph("ControlNetLoader", control_net_name="mini.safetensors")
            image = graph("LoadImage", image="left.png")
            both = graph("ControlNetApplyAdvanced", positive=text, negative=text, control_net=net,
                         image=image, strength=1.0, start_percent=0.0, end_percent=1.0)  # fmt: skip
            positive, negative = both, both.out(1)
        latent = graph("EmptyLatentImage", width=64, height=64, batch_size=1)
        found = graph("KSampler", model=model, positive=positive, negative=negative, seed=1, cfg=1.0,
                      latent_image=latent, steps=2, sampler_name="euler", scheduler="simple",
                      denoise=1.0)  # fmt: skip
        graph("SaveLatent", samples=found, filename_prefix=f"latents/{name}")

    Image.new("RGB", (64, 64), (200, 30, 90)).save(server.base / "input" / "left.png")
    graph = Graph(server)
    base = graph("UNETLoader", unet_name="mini_sd15.safetensors", weight_dtype="default")
    delta = graph("SaraLoadDelta", delta_name="mini.safetensors")
    applied = graph("SaraApply", model=base, delta=delta, strength=1.0)
    picture(graph, applied, "c_both")
    picture(graph, applied, "c_delta_only", control=False)
    picture(graph, base, "c_control_only")
    graph("ModelSave", model=applied, filename_prefix="weights/mini_merged")
    graph.run()
    merged = saved_weights(server, "mini_merged")
    save_file(merged, server.base / "models" / "diffusion_models" / "mini_merged.safetensors")
    graph = Graph(server)
    model = graph("UNETLoader", unet_name="mini_merged.safetensors", weight_dtype="default")
    picture(graph, model, "c_merged")
    graph.run()
    assert same(server, "c_both", "c_merged", 1e-4)
    assert not same(server, "c_both", "c_delta_only", 1e-3)
    assert not same(server, "c_both", "c_control_only", 1e-3)


def write_mini_controlnet(path):
    """A ControlNet of random weights for the miniature SD1.5."""
    import comfy.ops
    from comfy.cldm.cldm import ControlNet

    net = ControlNet(
        image_size=32, in_channels=4, hint_channels=3, model_channels=320, channel_mult=(1,),
        num_res_blocks=[1], transformer_depth=[1], transformer_depth_middle=1, context_dim=768,
        num_heads=8, use_spatial_transformer=True, use_linear_in_transformer=False, legacy=False,
        dtype=torch.float32, device="cpu", operations=comfy.ops.disable_weight_init,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(3)
    state = {
        f"control_model.{name}": torch.randn(tensor.shape, generator=generator) * 0.03
        if tensor.dim() > 1
        else torch.full(tensor.shape, float("norm" in name and name.endswith("weight")))
        for name, tensor in net.state_dict().items()
    }
    path.parent.mkdir(exist_ok=True)
    save_file(state, path)


def test_an_8_bit_model_trains_and_keeps_the_delta_through_the_executor(server):
    graph = Graph(server)
    clip = graph("CLIPLoader", clip_name="clip_l.safetensors", type="stable_diffusion")
    text = graph("CLIPTextEncode", clip=clip, text="3d strawberry")
    latent = graph("EmptyLatentImage", width=64, height=64, batch_size=2)
    base = graph("UNETLoader", unet_name="mini_sd15.safetensors", weight_dtype="fp8_e4m3fn")
    made = graph("KSampler", model=base, positive=text, negative=text, seed=2, cfg=1.0, steps=1,
                 latent_image=latent, sampler_name="euler", scheduler="simple", denoise=1.0)  # fmt: skip
    trained = graph("SaraTrain", model=base, latents=made, positive=text, steps=2, batch_size=2,
                    fraction=0.1, learning_rate=1e-3, output_name="eight_bit", save_dtype="fp32",
                    save_every_steps=0)  # fmt: skip
    graph("PreviewAny", source=trained.out(3))
    for name, model in (("q_base", base), ("q_trained", trained)):
        found = graph("KSampler", model=model, positive=text, negative=text, seed=1, cfg=1.0,
                      latent_image=latent, steps=2, sampler_name="euler", scheduler="simple",
                      denoise=1.0)  # fmt: skip
        graph("SaveLatent", samples=found, filename_prefix=f"latents/{name}")
    graph.run()
    (path,) = (server.base / "output" / "sara" / "eight_bit_00001").glob("*_2_steps.safetensors")
    assert SparseDelta.load(path).num_values > 1e6
    assert not same(server, "q_base", "q_trained", 1e-4)
