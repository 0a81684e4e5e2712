"""Deltas to and from the formats of others, through the executor."""

import re
import shutil

import pytest
import torch
from safetensors.torch import load_file

from ..diffusers_names import parameter_names
from ..harness.server import PromptError
from .graphs import Graph, saved_weights
from .scene import Scene, same


def test_exports_load_in_core_without_the_pack(server, deltas):
    loras = server.base / "models" / "loras"
    loras.mkdir(exist_ok=True)
    scene = Scene(server)
    exports = {}
    for name, options in {
        "exact": {"format": "differences (exact)"},
        "whole": {"format": "LoRA (approximate)", "rank": 1024},
        "small": {"format": "LoRA (approximate)", "rank": 2},
    }.items():
        exports[name] = scene.graph(
            "SaraExportDelta", delta=scene.delta(), dtype="fp32", filename_prefix=f"loras/{name}",
            **options,
        )  # fmt: skip
    outputs = scene.graph.run()
    texts = {name: outputs[str(node)]["text"][0] for name, node in exports.items()}
    assert "100.0% of the change's energy is kept" in texts["exact"]
    assert "100.0% of the change's energy is kept" in texts["whole"]
    kept = float(re.search(r"([\d.]+)% of the change", texts["small"])[1])
    assert 1 < kept < 60
    scene = Scene(server)
    scene.sample("e_applied", scene.applied(strength=0.7))
    for name in exports:
        (path,) = (server.base / "output" / "loras").glob(f"{name}_*.safetensors")
        shutil.copy(path, loras / f"{name}.safetensors")
    for name in exports:
        lora = scene.graph("LoraLoaderModelOnly", model=scene.base, lora_name=f"{name}.safetensors", strength_model=0.7)  # fmt: skip
        scene.sample(f"e_{name}", lora)
    scene.sample("e_base", scene.base)
    scene.graph.run()
    assert same(server, "e_exact", "e_applied", 1e-4)
    assert same(server, "e_whole", "e_applied", 1e-2)
    assert not same(server, "e_small", "e_applied", 1e-2)
    assert not same(server, "e_small", "e_base", 1e-2)


def test_a_checkpoint_of_the_authors_is_imported_with_its_base(server, deltas):
    """As their code saves it: values by number, of everything below the threshold, biases too."""
    import comfy.utils

    folder = server.base / "models" / "diffusion_models"
    base, threshold = load_file(folder / "mini_sd15.safetensors"), 0.004
    config = {"num_res_blocks": [1], "channel_mult": (1,), "transformer_depth": [1],
              "transformer_depth_output": [1, 1], "transformer_depth_middle": 1}  # fmt: skip
    ours = comfy.utils.unet_to_diffusers(config)
    names = [ours[name] for name in parameter_names([(1, (0,), False)], [(2, (1, 1), False)])]
    assert sorted(names) == sorted(base)
    learned, saved = (
        {name: weight.clone() for name, weight in base.items()},
        {"threshold": threshold},
    )
    generator = torch.Generator().manual_seed(0)
    for number, name in enumerate(names):
        mask = base[name].abs() < threshold
        learned[name][mask] += torch.randn(int(mask.sum()), generator=generator) * 0.01
        saved[number] = learned[name][mask].requires_grad_(True)
    torch.save(saved, server.base / "models" / "sara" / "unet.pt")

    def imported(unet):
        graph = Graph(server)
        model = graph("UNETLoader", unet_name=unet, weight_dtype="default")
        delta = graph("SaraImportCheckpoint", model=model, file="unet.pt")
        applied = graph("SaraApply", model=model, delta=delta, strength=1.0)
        graph("ModelSave", model=applied, filename_prefix="weights/imported")
        graph("SaraSaveDelta", delta=delta, filename_prefix="sara/imported", dtype="fp32")
        graph.run()

    imported("mini_sd15.safetensors")
    found = saved_weights(server, "imported")
    for name, weight in learned.items():
        key = next(k for k in found if k.endswith(f"diffusion_model.{name}"))
        assert torch.allclose(found[key], weight, atol=1e-6), name
    with pytest.raises(PromptError, match="was trained on another base"):
        imported("other_sd15.safetensors")
