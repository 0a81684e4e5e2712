"""SaRA Train beside core's Train LoRA, both through ComfyUI's executor.

Run by `python dev.py bench --executor`: on emoji64 with its 40 pictures, or with `--full` on SD1.5's
UNet at its real size, one latent of 4x32x32. Time per step is the difference between a long and a
short training divided by the difference in steps, so that loading and encoding do not count; a server
of its own for each, and the peak of its resident memory since just before the training. With `--out`
the rows are added to those of an earlier `python dev.py bench`. Train LoRA fails in ComfyUI 0.3.75, so
a newer one is needed.
"""

import argparse
import importlib.util
import json
import math
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file

from sara_core import SparseDelta

from ..harness.server import PromptError, Server, make_base
from .report import checks_in_comfyui, in_comfyui, write

ROOT = Path(__file__).resolve().parents[2]
NAMES = {"SaraTrain": "sara-in-comfyui", "TrainLoraNode": "comfyui-train-lora"}
SIZES = {  # steps of the short and the long training, batch size
    "small": (4, 24, 8),
    "full": (2, 5, 1),  # core's graph cannot draw a single loss
}
WRITE_UNET = (
    "import sys; from tests.benchmark.method import make_unet; from safetensors.torch import save_file;"
    "save_file(make_unet('full').state_dict(), sys.argv[1])"
)


def defaults(info, node):
    """Return a node's widgets at their defaults."""
    values = {}
    for group in ("required", "optional"):
        for name, (kind, *options) in info[node]["input"].get(group, {}).items():
            if options and "default" in options[0]:
                values[name] = options[0]["default"]
            elif isinstance(kind, list):
                values[name] = kind[-1]
    return values


def inputs_of(info, size):
    """Nodes that load the model and the pictures, and where they come out."""
    if size == "full":
        return {
            "1": {"class_type": "UNETLoader",
                  "inputs": {"unet_name": "full.safetensors", "weight_dtype": "default"}},
            "2": {"class_type": "CLIPLoader",
                  "inputs": {"clip_name": "clip_l.safetensors", "type": "stable_diffusion"}},
            "3": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["2", 0], "text": "a cat"}},
            "6": {"class_type": "EmptyLatentImage",
                  "inputs": {"width": 256, "height": 256, "batch_size": 1}},
            "8": {"class_type": "KSampler", "inputs": {  # made once; it stands for a picture
                "model": ["1", 0], "positive": ["3", 0], "negative": ["3", 0], "latent_image": ["6", 0],
                "seed": 0, "steps": 1, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple",
                "denoise": 1.0}},
        }, {"model": ["1", 0], "latents": ["8", 0], "positive": ["3", 0]}  # fmt: skip
    folder = {**defaults(info, "SaraImageFolder"), "vae": ["1", 2], "clip": ["1", 1],
              "folder": "input/fluent3d", "size": 64}  # fmt: skip
    return {
        "1": {"class_type": "CheckpointLoaderSimple",
              "inputs": {"ckpt_name": "emoji64.safetensors"}},
        "2": {"class_type": "ModelSamplingSD3", "inputs": {"model": ["1", 0], "shift": 1.0}},
        "3": {"class_type": "SaraImageFolder", "inputs": folder},
    }, {"model": ["2", 0], "latents": ["3", 0], "positive": ["3", 1]}  # fmt: skip


def prompt(info, node, steps, options, size):
    before, links = inputs_of(info, size)
    train = {**defaults(info, node), **links, "steps": steps, "batch_size": SIZES[size][2],
             "gradient_checkpointing": False, "training_dtype": "fp32", **options}  # fmt: skip
    nodes = {
        **before,
        "4": {"class_type": node, "inputs": train},
        "5": {"class_type": "LossGraphNode", "inputs": {
            "loss": ["4", info[node]["output"].index("LOSS_MAP")], "filename_prefix": "loss"}},
    }  # fmt: skip
    if "LORA_MODEL" in info[node]["output"]:
        lora = ["4", info[node]["output"].index("LORA_MODEL")]
        nodes["7"] = {"class_type": "SaveLoRA", "inputs": {"lora": lora, "prefix": "bench/lora"}}
    return nodes


def num_trained(output):
    """Count the numbers in the newest file that a training has left."""
    newest = max(output.rglob("*.safetensors"), key=lambda path: path.stat().st_mtime)
    if newest.parent.name != "bench":
        return SparseDelta.load(newest).num_values
    tensors = load_file(newest)
    return sum(t.numel() for name, t in tensors.items() if not name.endswith("alpha"))


def num_parameters(base, size):
    """Count the weights of the diffusion model."""
    models = base / "models"
    path, prefix = models / "diffusion_models" / "full.safetensors", ""
    if size == "small":
        path, prefix = models / "checkpoints" / "emoji64.safetensors", "model.diffusion_model."
    with safe_open(path, framework="pt") as file:
        shapes = (file.get_slice(key).get_shape() for key in file.keys() if key.startswith(prefix))  # noqa: SIM118
        return sum(math.prod(shape) for shape in shapes)


def memory(server, field):
    status = (Path("/proc") / str(server.process.pid) / "status").read_text()
    return 1024 * int(re.search(rf"{field}:\s+(\d+)", status)[1])


def add_unet(base):
    """Write SD1.5's UNet with random weights, and a text encoder."""
    from safetensors.torch import save_file

    for folder in ("diffusion_models", "text_encoders"):
        (base / "models" / folder).mkdir()
    unet = base / "models" / "diffusion_models" / "full.safetensors"
    subprocess.run([sys.executable, "-c", WRITE_UNET, str(unet)], cwd=ROOT, check=True)
    path = ROOT / "tests" / "assets" / "emoji64" / "assemble.py"
    spec = importlib.util.spec_from_file_location("assemble", path)
    assemble = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(assemble)
    save_file(assemble.clip_l(), base / "models" / "text_encoders" / "clip_l.safetensors")


def measure(node, options, size):
    """Train short, then long. Returns a row of docs/benchmark.json."""
    short, long, _ = SIZES[size]
    with tempfile.TemporaryDirectory() as scratch:
        make_base(Path(scratch))
        if size == "full":
            add_unet(Path(scratch))
        with Server(scratch) as server:
            info = server.get("/object_info")
            server.run(prompt(info, node, 2, options, size))  # loads and encodes
            (Path("/proc") / str(server.process.pid) / "clear_refs").write_text("5")
            before, seconds = memory(server, "VmRSS"), {}
            for steps in (short, long):
                started = time.perf_counter()
                server.run(prompt(info, node, steps, options, size))
                seconds[steps] = time.perf_counter() - started
            peak = memory(server, "VmHWM")
            version = server.get("/system_stats")["system"]["comfyui_version"]
        trained = num_trained(Path(scratch) / "output")
        parameters = num_parameters(Path(scratch), size)
    return {
        "method": NAMES[node] + ("-small" if size == "small" else ""),
        "dtype": "float32",
        "comfyui": version,
        "trained": trained,
        "trained_fraction": trained / parameters,
        "parameters": parameters,
        "step_seconds": (seconds[long] - seconds[short]) / (long - short),
        "peak_bytes": peak,
        "grown_bytes": peak - before,
    }


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--full", action="store_true", help="SD1.5's UNet at its real size")
    parser.add_argument("--out", type=Path, help="such as docs/benchmark: add the rows there")
    options = parser.parse_args()
    size = "full" if options.full else "small"
    rows = []
    for node, widgets in (
        ("SaraTrain", {"output_name": "bench", "save_every_steps": 0}),
        ("TrainLoraNode", {"rank": 8, "lora_dtype": "fp32", "existing_lora": "[None]"}),
    ):
        try:
            rows.append(measure(node, widgets, size))
        except PromptError as error:
            print(f"{node}: not measured, {str(error)[:300]}")
    print("\n".join(in_comfyui(rows)))
    for text, holds in checks_in_comfyui({row["method"]: row for row in rows}):
        print(f"{'holds' if holds else 'DOES NOT HOLD'}: {text}")
    if options.out:
        data = json.loads(options.out.with_suffix(".json").read_text())
        replaced = {row["method"] for row in rows}
        data["rows"] = [r for r in data["rows"] if r["method"] not in replaced] + rows
        write(data, options.out)


if __name__ == "__main__":
    main()
