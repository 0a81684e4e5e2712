"""SaRA Train beside core's Train LoRA, both through ComfyUI's executor.

Run by `python dev.py bench --executor`: on emoji64 with its 40 pictures, or with `--full` on SD1.5's
UNet at its real size, one latent of 4x32x32. Time per step is the difference between a long and a short
training divided by the difference in steps, so that loading and encoding do not count; a server of
its own for each, and the peak of its resident memory since just before the training.
"""

import argparse
import importlib.util
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from ..faults import load_dev

ROOT = Path(__file__).resolve().parents[2]
SIZES = {  # steps of the short and the long training, batch size
    "small": (4, 24, 8),
    "full": (1, 4, 1),
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
        }, {"model": ["1", 0], "latents": ["6", 0], "positive": ["3", 0]}  # fmt: skip
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
    return {
        **before,
        "4": {"class_type": node, "inputs": train},
        "5": {"class_type": "LossGraphNode", "inputs": {
            "loss": ["4", info[node]["output"].index("LOSS_MAP")], "filename_prefix": "loss"}},
    }  # fmt: skip


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


def measure(dev, node, options, size):
    """Train short, then long; returns seconds per step and peak bytes, all and above those before."""
    short, long, _ = SIZES[size]
    with tempfile.TemporaryDirectory() as scratch:
        dev.make_base(Path(scratch))
        if size == "full":
            add_unet(Path(scratch))
        with dev.Server(scratch) as server:
            info = server.get("/object_info")
            server.run(prompt(info, node, 2, options, size))  # loads and encodes
            (Path("/proc") / str(server.process.pid) / "clear_refs").write_text("5")
            before, seconds = memory(server, "VmRSS"), {}
            for steps in (short, long):
                started = time.perf_counter()
                server.run(prompt(info, node, steps, options, size))
                seconds[steps] = time.perf_counter() - started
            peak = memory(server, "VmHWM")
    return (seconds[long] - seconds[short]) / (long - short), peak, peak - before


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--full", action="store_true", help="SD1.5's UNet at its real size")
    size = "full" if parser.parse_args().full else "small"
    dev = load_dev()
    found = {}
    for node, options in (
        ("SaraTrain", {"output_name": "bench", "save_every_steps": 0}),
        ("TrainLoraNode", {"rank": 8, "lora_dtype": "fp32", "existing_lora": "[None]"}),
    ):
        try:
            found[node] = measure(dev, node, options, size)
        except dev.PromptError as error:
            print(f"{node}: not measured, {str(error)[:300]}")
            continue
        step, peak, grown = found[node]
        print(f"{node}: {step:.3f} s per step of batch {SIZES[size][2]}, peak {peak / 1e6:.0f} MB, "
              f"{grown / 1e6:.0f} MB above what was held before")  # fmt: skip
    if len(found) == 2:
        ratio = found["SaraTrain"][0] / found["TrainLoraNode"][0]
        print(f"SaRA Train's step is {ratio:.2f} x Train LoRA's")
        row = {"seconds": found["SaraTrain"][0], "peak_bytes": found["SaraTrain"][1],
               "lora_seconds": found["TrainLoraNode"][0],
               "lora_peak_bytes": found["TrainLoraNode"][1]}  # fmt: skip
        print(json.dumps({size: row}))


if __name__ == "__main__":
    main()
