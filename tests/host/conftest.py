"""A real ComfyUI, once in this process and once as a server; needs COMFYUI_PATH.

`python dev.py test` sets all of it up.
"""

import importlib.util
import os
import re
import shlex
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from ..harness.environment import checkpoint
from ..harness.server import Server, make_base

ROOT = Path(__file__).resolve().parents[2]

if comfyui := os.environ.get("COMFYUI_PATH"):
    sys.path.insert(0, comfyui)  # ahead of ours: nodes/ must not hide ComfyUI's nodes.py
    sys.modules.pop("utils", None)
    import utils.extra_config  # noqa: F401  (before torch's or a tool's `utils` is found)
    from comfy.cli_args import args

    args.cpu = True
    args.use_pytorch_cross_attention = True


class NotRun(pytest.Module):
    """A module of tests that needs the ComfyUI that is not there."""

    def collect(self):
        pytest.skip("set COMFYUI_PATH, or run python dev.py test", allow_module_level=True)


def pytest_pycollect_makemodule(module_path, parent):
    """Skip these tests where no ComfyUI is named; one that cannot be imported is an error."""
    if not os.environ.get("COMFYUI_PATH"):
        return NotRun.from_parent(parent, path=module_path)
    return None


def module_from(path):
    spec = importlib.util.spec_from_file_location(f"sara_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def scratch(tmp_path, monkeypatch):
    """Let folders made in passing be deleted with the test's own."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """A running ComfyUI with the pack, emoji64 and a miniature SD1.5."""
    from safetensors.torch import save_file

    from .models import write_mini_sd15

    base = tmp_path_factory.mktemp("comfyui")
    make_base(base)
    (base / "models" / "diffusion_models").mkdir()
    write_mini_sd15(base / "models" / "diffusion_models" / "mini_sd15.safetensors")
    write_mini_sd15(base / "models" / "diffusion_models" / "other_sd15.safetensors", seed=1)
    (base / "models" / "text_encoders").mkdir()
    assemble = module_from(ROOT / "tests" / "assets" / "emoji64" / "assemble.py")
    save_file(assemble.clip_l(), base / "models" / "text_encoders" / "clip_l.safetensors")
    elsewhere = base / "elsewhere"
    elsewhere.mkdir()
    (base / "extra.yaml").write_text(
        f"mine:\n  base_path: {elsewhere}\n  sara: deltas\n  datasets: sets\n"
    )
    arguments = ["--extra-model-paths-config", base / "extra.yaml"]
    arguments += shlex.split(os.environ.get("COMFYUI_ARGS", ""))  # such as --front-end-root
    with Server(base, arguments) as running:
        yield running


@pytest.fixture(scope="session")
def sara():
    """The pack's modules, imported as ComfyUI does."""
    import types

    from sara_pack import sara_core
    from sara_pack.nodes import host, output_folder
    from sara_pack.nodes.training import examples, folders, run, training_set
    from sara_pack.sara_core.optimizer import eight_bits, learning_rate
    from sara_pack.sara_core.training import run_folder, run_settings
    from sara_pack.sara_core.weights import quantised

    return types.SimpleNamespace(
        host=host, output=output_folder, run=run, folders=folders, sets=training_set, examples=examples, core=sara_core, rate=learning_rate,
        settings=run_settings, folder=run_folder, eight_bits=eight_bits, quantised=quantised,
    )  # fmt: skip


@pytest.fixture
def sd15(tmp_path):
    import comfy.sd

    from .models import write_mini_sd15

    write_mini_sd15(tmp_path / "mini.safetensors")
    with torch.inference_mode():
        return comfy.sd.load_diffusion_model(str(tmp_path / "mini.safetensors"))


@pytest.fixture
def emoji64():
    import comfy.sd

    with torch.inference_mode():
        return comfy.sd.load_checkpoint_guess_config(str(checkpoint()), output_vae=False)[0]


@pytest.fixture(scope="session")
def trained(server):
    """Analyze, train 40 steps, and sample before, after and with the weights zeroed."""
    from .graphs import Graph, dataset, emoji64, sample

    graph = Graph(server)
    checkpoint, model, empty = emoji64(graph)
    analyze = graph("SaraAnalyze", model=model, fraction=0.1)
    graph("PreviewImage", images=analyze.out(3))
    data = dataset(graph, checkpoint)
    graph("ModelSave", model=checkpoint, filename_prefix="weights/before")
    train = graph(
        "SaraTrain", model=analyze, latents=data, positive=data.out(1), empty=empty,
        threshold=analyze.out(1), steps=40, batch_size=8, learning_rate=4e-4, output_name="shared",
    )  # fmt: skip
    graph("LossGraphNode", loss=train.out(2))
    sample(graph, checkpoint, empty, model, "base")
    sample(graph, checkpoint, empty, train, "trained")
    sample(graph, checkpoint, empty, analyze.out(4), "zeroed")
    outputs = graph.run()
    return {"outputs": outputs, "train": train, "analyze": analyze, "graph": graph}


@pytest.fixture(scope="session")
def delta_name(trained):
    text = trained["outputs"][trained["train"]]["text"][0]
    return re.fullmatch(r"saved (\S+), loss [\d.]+", text)[1]


@pytest.fixture(scope="session")
def deltas(server):
    """Three deltas for emoji64 and one for the miniature SD1.5."""
    from .scene import make_delta

    folder = server.base / "models" / "sara"
    make_delta(folder / "one.safetensors", checkpoint())
    make_delta(folder / "two.safetensors", checkpoint(), seed=1)
    make_delta(folder / "three.safetensors", checkpoint(), seed=4)
    mini = server.base / "models" / "diffusion_models" / "mini_sd15.safetensors"
    make_delta(folder / "mini.safetensors", mini, prefix="", seed=2)
