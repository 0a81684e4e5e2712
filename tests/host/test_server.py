"""Every node and the whole way through a server."""

import re
import threading

import pytest
import torch
from safetensors.torch import load_file

from sara_core import SparseDelta

from ..harness.environment import checkpoint
from ..harness.server import PromptError
from .graphs import (
    Graph,
    assert_same_weights,
    dataset,
    emoji64,
    sample,
    saved_latents,
    saved_weights,
)

INPUTS = {  # public: saved workflows depend on every name
    "SaraImageFolder": "vae clip folder size max_buckets divisible_by crop crops max_upscale flip "
    "alpha background trigger default_caption repeats problems seed cache_gb parentheses subfolders caption_lines shuffle_tags tag_dropout keep_tags caption_variants more_sizes model",
    "SaraAnalyze": "model threshold fraction count include exclude zeros",
    "SaraTrain": "model latents positive steps batch_size threshold fraction learning_rate output_name seed "
    "save_every_steps preview_every_steps resume include exclude zeros lr_schedule "
    "warmup_steps progressive low_rank_weight weight_decay max_grad_norm grad_accumulation_steps "
    "loss_function caption_dropout regularisation_weight gradient_checkpointing training_dtype "
    "validation_split validate_every_steps keep_checkpoints save_dtype trigger_words "
    "preview_strength empty more_steps allow_other_prediction offloading moments keep_state lora_file "
    "loss_weighting snr_gamma timestep_distribution logit_mean logit_std lowest_noise highest_noise "
    "noise_offset weights_on_device trained_in epochs patience put_out flow_shift guidance lr_cycles select_from ema_decay optimizer layer_rates tensorboard select_by masks regularisation_latents regularisation_positive preview",
    "SaraJoinPictures": "latents positive latents_2 positive_2 repeats repeats_2 masks masks_2",
    "SaraReferencePictures": "latents folder fit background",
    "SaraVideoFolder": "vae clip folder frames fps clips size max_buckets divisible_by crop max_upscale flip background "
    "trigger default_caption repeats problems seed cache_gb parentheses subfolders caption_lines shuffle_tags "
    "tag_dropout keep_tags caption_variants model",
    "SaraPrompts": "clip prompts before",
    "SaraSampling": "vae positive negative seed steps cfg sampler_name scheduler latent previous",
    "SaraCompareRuns": "run others smoothing",
    "SaraLoadCheckpoints": "run steps",
    "SaraCompare": "model sampling deltas strengths deltas_2 deltas_3 deltas_4",
    "SaraLoadDelta": "delta_name file",
    "SaraSaveDelta": "delta filename_prefix dtype",
    "SaraMergeDeltas": "delta_1 delta_2 strength_1 strength_2",
    "SaraApply": "model delta strength",
    "SaraBlockStrengths": "delta strengths others",
    "SaraCreateHook": "delta strength prev_hooks",
    "SaraExportDelta": "delta format rank dtype filename_prefix",
    "SaraImportCheckpoint": "model file",
}


OUTPUTS = {
    "SaraImageFolder": [
        "LATENT",
        "CONDITIONING",
        "MASK",
        "CONDITIONING",
        "IMAGE",
        "STRING",
        "STRING",
    ],
    "SaraAnalyze": ["MODEL", "FLOAT", "STRING", "IMAGE", "MODEL"],
    "SaraTrain": ["MODEL", "SARA_DELTA", "LOSS_MAP", "STRING"],
    "SaraJoinPictures": ["LATENT", "CONDITIONING", "MASK"],
    "SaraReferencePictures": ["IMAGE"],
    "SaraVideoFolder": ["LATENT", "CONDITIONING", "CONDITIONING", "IMAGE", "STRING", "STRING"],
    "SaraPrompts": ["CONDITIONING", "STRING"],
    "SaraSampling": ["SARA_SAMPLING"],
    "SaraCompareRuns": ["IMAGE", "STRING"],
    "SaraLoadCheckpoints": ["SARA_DELTA", "STRING"],
    "SaraCompare": ["IMAGE", "IMAGE"],
    "SaraLoadDelta": ["SARA_DELTA", "STRING"],
    "SaraSaveDelta": [],
    "SaraMergeDeltas": ["SARA_DELTA"],
    "SaraApply": ["MODEL"],
    "SaraBlockStrengths": ["SARA_DELTA", "STRING"],
    "SaraCreateHook": ["HOOKS"],
    "SaraExportDelta": ["STRING", "FLOAT"],
    "SaraImportCheckpoint": ["SARA_DELTA"],
}


def test_all_nodes_are_there_with_their_public_names(server):
    info = server.get("/object_info")
    ours = {name: node for name, node in info.items() if name.startswith("Sara")}
    assert ours.keys() == INPUTS.keys()
    for name, node in ours.items():
        groups = {k: v for k, v in node["input"].items() if k != "hidden"}
        found = [key for group in ("required", "optional") for key in groups.get(group, {})]
        assert found == INPUTS[name].split(), name
        assert node["output"] == OUTPUTS[name]
        assert node["display_name"].replace("SaRA", "").strip() != node["display_name"]
        assert node["description"]
        for group in groups.values():
            for key, spec in group.items():
                assert dict(*spec[1:]).get("tooltip"), f"{name}.{key}"
        assert all(node["output_tooltips"]), name
    assert "IMPORT FAILED: ComfyUI-SaRA" not in server.log_text()


def test_analyze_reports_what_the_core_finds(server, trained):
    text = trained["outputs"][trained["analyze"]]["text"][0]
    assert "joint_blocks.3" in text
    weights = load_file(checkpoint())
    prefix = "model.diffusion_model."
    flat = torch.cat(
        [w.float().abs().flatten() for k, w in weights.items()
         if k.startswith(prefix) and w.dim() > 1 and "pos_embed" not in k]
    )  # fmt: skip
    threshold = float(re.match(r"threshold (\S+) selects", text)[1])
    border = flat.sort().values[round(0.1 * len(flat))]  # one of several that are equal
    above = flat[flat > border].min()
    assert border < threshold <= above * (1 + 1e-5)
    assert f"selects {int((flat <= border).sum()):,} of" in text


def test_training_writes_a_file_that_scripts_can_read(server, delta_name, trained):
    assert delta_name == "shared_00001/shared_40_steps.safetensors"
    delta = SparseDelta.load(server.base / "output" / "sara" / delta_name)
    told = trained["outputs"][trained["analyze"]]["text"][0]
    assert f"selects {delta.num_values:,} of" in told
    assert '"steps": 40' in delta.metadata["sara.settings"]
    assert delta.metadata["modelspec.architecture"] == "sd3/sara"
    assert delta.metadata["modelspec.prediction_type"] == "flow"
    values = torch.cat([e.values.float() for e in delta.entries.values()])
    assert (values != 0).float().mean() > 0.9
    size = (server.base / "output" / "sara" / delta_name).stat().st_size
    assert size < 3.2 * delta.num_values


def test_training_learns_the_pictures(server, delta_name):
    """The loss on all pictures at fixed noise falls; measured with a one-step run at zero effect."""
    graph = Graph(server)
    checkpoint, model, empty = emoji64(graph)
    data = dataset(graph, checkpoint)
    delta = graph("SaraLoadDelta", delta_name=delta_name)
    common = {
        "latents": data, "positive": data.out(1), "fraction": 0.01, "steps": 1, "batch_size": 40,
        "grad_accumulation_steps": 4, "learning_rate": 1e-7, "seed": 5,
    }  # fmt: skip
    base = graph("SaraTrain", model=model, output_name="probe_base", **common)
    tuned = graph("SaraApply", model=model, delta=delta)
    tuned = graph("SaraTrain", model=tuned, output_name="probe_tuned", **common)
    outputs = graph.run()
    before, after = (float(outputs[n]["text"][0].split()[-1]) for n in (base, tuned))
    assert after < 0.85 * before


def test_same_seed_gives_the_same_delta_and_the_base_is_untouched(server, trained):
    graph = Graph(server)
    checkpoint, model, empty = emoji64(graph)
    data = dataset(graph, checkpoint)
    for name, seed in (("once", 3), ("twice", 3), ("other", 4)):
        graph(
            "SaraTrain", model=model, latents=data, positive=data.out(1), empty=empty, steps=2,
            batch_size=4, seed=seed, output_name=name, save_dtype="fp32",
        )  # fmt: skip
    graph.run()
    graph = Graph(server)
    checkpoint, _, _ = emoji64(graph)
    graph("ModelSave", model=checkpoint, filename_prefix="weights/after_success")
    graph.run()
    folder = server.base / "output" / "sara"
    once, twice, other = (
        SparseDelta.load(folder / f"{name}_00001" / f"{name}_2_steps.safetensors")
        for name in ("once", "twice", "other")
    )
    for name, entry in once.entries.items():
        assert torch.equal(entry.values, twice.entries[name].values)
    assert any(not torch.equal(e.values, other.entries[n].values) for n, e in once.entries.items())
    assert_same_weights(saved_weights(server, "before"), saved_weights(server, "after_success"))


def test_cancel_and_errors_bring_the_base_back_and_the_server_goes_on(server, trained):
    graph = Graph(server)
    checkpoint, model, empty = emoji64(graph)
    data = dataset(graph, checkpoint)
    graph(
        "SaraTrain", model=model, latents=data, positive=data.out(1), steps=5000, batch_size=8,
        learning_rate=1e-2, output_name="cancelled",
    )  # fmt: skip
    seen = threading.Event()

    events = server.events()

    def cancel():
        for event in events:
            if event["type"] == "progress" and event["data"]["max"] == 5000:
                if event["data"]["value"] >= 3:
                    server.post("/interrupt", {})
                    seen.set()
                    return

    watcher = threading.Thread(target=cancel, daemon=True)
    watcher.start()
    with pytest.raises(PromptError, match="execution_interrupted"):
        graph.run()
    assert seen.is_set()

    graph = Graph(server)
    checkpoint, model, empty = emoji64(graph)
    data = dataset(graph, checkpoint)
    graph(
        "SaraTrain", model=model, latents=data, positive=data.out(1), steps=5, include="nowhere",
        output_name="failed",
    )  # fmt: skip
    with pytest.raises(PromptError, match="nowhere"):
        graph.run()

    graph = Graph(server)
    checkpoint, model, empty = emoji64(graph)
    graph("ModelSave", model=checkpoint, filename_prefix="weights/after_cancel")
    sample(graph, checkpoint, empty, model, "after_cancel")
    graph.run()
    assert_same_weights(saved_weights(server, "before"), saved_weights(server, "after_cancel"))
    assert torch.equal(saved_latents(server, "after_cancel"), saved_latents(server, "base"))


def test_pictures_of_mixed_sizes_train(server):
    from PIL import Image

    folder = server.base / "input" / "mixed"
    folder.mkdir()
    for i, size in enumerate([(64, 64), (96, 64), (64, 96), (64, 64), (96, 64)]):
        Image.new("RGB", size, (40 * i, 90, 200)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"colour {i}")
    graph = Graph(server)
    checkpoint, model, empty = emoji64(graph)
    data = dataset(graph, checkpoint, "mixed")
    train = graph(
        "SaraTrain", model=model, latents=data, positive=data.out(1), empty=empty, steps=4,
        batch_size=2, grad_accumulation_steps=2, output_name="mixed", gradient_checkpointing=True,
    )  # fmt: skip
    assert "saved mixed_00001/mixed_4_steps" in graph.run()[train]["text"][0]


def test_a_miniature_sd15_trains_on_a_batched_latent_with_one_caption(server, delta_name):
    begun = len(server.log_text())
    graph = Graph(server)
    model = graph("UNETLoader", unet_name="mini_sd15.safetensors", weight_dtype="default")
    clip = graph("CLIPLoader", clip_name="clip_l.safetensors", type="stable_diffusion")
    text = graph("CLIPTextEncode", clip=clip, text="a picture")
    latent = graph("EmptyLatentImage", width=64, height=64, batch_size=4)
    noise = graph(
        "KSampler", model=model, positive=text, negative=text, latent_image=latent, seed=1, steps=1,
        cfg=1.0, sampler_name="euler", scheduler="simple", denoise=1.0,
    )  # fmt: skip
    common = {"latents": noise, "positive": text, "batch_size": 4, "fraction": 0.2}
    train = graph(
        "SaraTrain", model=model, empty=text, steps=30, learning_rate=3e-3, output_name="mini",
        **common,
    )  # fmt: skip
    probe = {"steps": 1, "grad_accumulation_steps": 8, "learning_rate": 1e-7, "seed": 9}
    base = graph("SaraTrain", model=model, output_name="probe_mini", **common, **probe)
    tuned = graph("SaraTrain", model=train, output_name="probe_tuned_mini", **common, **probe)
    outputs = graph.run()
    before, after = (float(outputs[n]["text"][0].split()[-1]) for n in (base, tuned))
    assert after < 0.97 * before
    delta = SparseDelta.load(
        server.base / "output" / "sara" / "mini_00001" / "mini_30_steps.safetensors"
    )
    assert delta.metadata["modelspec.prediction_type"] == "epsilon"

    wrong = Graph(server)
    model = wrong("UNETLoader", unet_name="mini_sd15.safetensors", weight_dtype="default")
    loaded = wrong("SaraLoadDelta", delta_name=delta_name)
    applied = wrong("SaraApply", model=model, delta=loaded)
    wrong("ModelSave", model=applied, filename_prefix="weights/never")
    with pytest.raises(PromptError, match=r"does not fit the SD15 model.*is not in the model"):
        wrong.run()

    other = Graph(server)
    model = other("UNETLoader", unet_name="other_sd15.safetensors", weight_dtype="default")
    loaded = other("SaraLoadDelta", delta_name="mini_00001/mini_30_steps.safetensors")
    applied = other("SaraApply", model=model, delta=loaded)
    other("ModelSave", model=applied, filename_prefix="weights/other_base")
    assert "trained on another base" not in server.log_text()[begun:]
    other.run()
    assert "trained on another base" in server.log_text()[begun:]
    assert saved_weights(server, "other_base")
