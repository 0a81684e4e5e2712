"""SaRA Train beside core's Train LoRA, both through ComfyUI's executor, on the small model.

Run by `python dev.py bench --executor`. Time per step is the difference between a long and a short
training divided by the difference in steps, so that loading and encoding do not count; a server of
its own for each, and the peak of its resident memory since just before the training.
"""

import argparse
import re
import tempfile
import time
from pathlib import Path

from ..faults import load_dev

SHORT, LONG, BATCH = 4, 24, 8


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


def prompt(info, node, steps, options):
    train = {**defaults(info, node), "model": ["2", 0], "latents": ["3", 0], "positive": ["3", 1],
             "steps": steps, "batch_size": BATCH, "gradient_checkpointing": False,
             "training_dtype": "fp32", **options}  # fmt: skip
    folder = {**defaults(info, "SaraImageFolder"), "vae": ["1", 2], "clip": ["1", 1],
              "folder": "input/fluent3d", "size": 64}  # fmt: skip
    return {
        "1": {"class_type": "CheckpointLoaderSimple",
              "inputs": {"ckpt_name": "emoji64.safetensors"}},
        "2": {"class_type": "ModelSamplingSD3", "inputs": {"model": ["1", 0], "shift": 1.0}},
        "3": {"class_type": "SaraImageFolder", "inputs": folder},
        "4": {"class_type": node, "inputs": train},
        "5": {"class_type": "LossGraphNode", "inputs": {
            "loss": ["4", info[node]["output"].index("LOSS_MAP")], "filename_prefix": "loss"}},
    }  # fmt: skip


def memory(server, field):
    status = (Path("/proc") / str(server.process.pid) / "status").read_text()
    return 1024 * int(re.search(rf"{field}:\s+(\d+)", status)[1])


def measure(dev, node, options):
    """Train short, then long; returns seconds per step and peak bytes above what was held before."""
    with tempfile.TemporaryDirectory() as scratch:
        dev.make_base(Path(scratch))
        with dev.Server(scratch) as server:
            info = server.get("/object_info")
            server.run(prompt(info, node, 2, options))  # loads and encodes
            (Path("/proc") / str(server.process.pid) / "clear_refs").write_text("5")
            before, seconds = memory(server, "VmRSS"), {}
            for steps in (SHORT, LONG):
                started = time.perf_counter()
                server.run(prompt(info, node, steps, options))
                seconds[steps] = time.perf_counter() - started
            peak = memory(server, "VmHWM")
    return (seconds[LONG] - seconds[SHORT]) / (LONG - SHORT), peak, peak - before


def main():
    argparse.ArgumentParser().parse_args()
    dev = load_dev()
    found = {}
    for node, options in (
        ("SaraTrain", {"output_name": "bench", "save_every_steps": 0}),
        ("TrainLoraNode", {"rank": 8, "lora_dtype": "fp32", "existing_lora": "[None]"}),
    ):
        try:
            found[node] = measure(dev, node, options)
        except dev.PromptError as error:
            print(f"{node}: not measured, {str(error)[:300]}")
            continue
        step, peak, grown = found[node]
        print(f"{node}: {step:.3f} s per step of batch {BATCH}, peak {peak / 1e6:.0f} MB, "
              f"{grown / 1e6:.0f} MB above what was held before")  # fmt: skip
    if len(found) == 2:
        ratio = found["SaraTrain"][0] / found["TrainLoraNode"][0]
        print(f"SaRA Train's step is {ratio:.2f} x Train LoRA's")


if __name__ == "__main__":
    main()
