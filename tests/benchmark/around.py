# ruff: noqa: E402, I001
"""What surrounds a training step: the plain update, analysing, saving, loading, applying.

Run by `tests/benchmark/run.py` in a process of its own; prints one JSON object, times in seconds.
"""

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

from .method import ROOT, make_unet  # sets ComfyUI up, so it comes first
from ..conftest import pack  # noqa: F401  (makes sara_pack importable)
from ..harness.memory import growth, timed

import comfy.model_management
import comfy.model_patcher
import torch
from comfy.weight_adapter import LoRAAdapter
from sara_pack.nodes import host
from sara_pack.sara_core import SaraAdamW, SparseDelta
from sara_pack.sara_core.optimizer import low_rank
from sara_pack.sara_core.weights.analysis import analyze
from sara_pack.sara_core.files.atomic import replace_atomically
from sara_pack.sara_core.optimizer.low_rank import nuclear_norm_gradient
from sara_pack.sara_core.weights.parameters import choose_parameters

REPEATS = 7
LARGE = (10240, 1280)


def median(function):
    return statistics.median(timed(function) for _ in range(REPEATS))


def plain_update(sizes):
    """Time torch's AdamW over so many ordinary numbers, first step apart."""
    leaves = [torch.nn.Parameter(torch.randn(size)) for size in sizes]
    optimizer = torch.optim.AdamW(leaves, lr=1e-4)
    for leaf in leaves:
        leaf.grad = torch.randn_like(leaf)
    optimizer.step()
    return median(optimizer.step)


def large_low_rank():
    """Time the low-rank term of a large layer, as on this processor and as on a graphics card."""
    weight = torch.randn(LARGE)
    index = torch.nonzero(weight.flatten().abs() < 0.1257)[:, 0]
    values = weight.flatten()[index]
    matrix = torch.zeros(LARGE).flatten().scatter_(0, index, values).view(LARGE).T
    return {
        "large_low_rank_seconds": median(lambda: nuclear_norm_gradient(values, index, LARGE)),
        "large_low_rank_products_seconds": median(lambda: low_rank._by_products(matrix)),
        "large_svd_seconds": median(lambda: torch.linalg.svd(matrix, full_matrices=False)),
    }


def files(delta, folder):
    """Time a delta's file beside the same bytes written as safely, a new file flushed and renamed.

    Of two in a row the second counts: memory that lay idle is slow to touch again.
    """
    path, raw = folder / "delta.safetensors", folder / "raw"
    delta.save(path)
    data = path.read_bytes()
    jobs = {"save_seconds": lambda: delta.save(path),
            "write_seconds": lambda: replace_atomically(raw, lambda to: to.write_bytes(data)),
            "load_seconds": lambda: SparseDelta.load(path), "read_seconds": raw.read_bytes}  # fmt: skip
    times = {name: [] for name in jobs}
    for _ in range(REPEATS):
        for name, job in jobs.items():
            job()
            times[name].append(timed(job))
    found = {name: statistics.median(seconds) for name, seconds in times.items()}
    return {"file_bytes": len(data), **found}


def applying_to_a_module(net, delta):
    """Time adding a delta to a module, and a pass that reads and writes every weight."""
    apply, touch = [], []
    for _ in range(REPEATS):
        started = time.perf_counter()
        undo = delta.apply_to(net)
        apply.append(time.perf_counter() - started)
        undo()
        touch.append(timed(lambda: [p.data.mul_(1.0) for p in net.parameters()]))
    return {
        "apply_to_seconds": statistics.median(apply),
        "touch_seconds": statistics.median(touch),
    }


def patched(patcher):
    comfy.model_management.load_models_gpu([patcher], force_full_load=True)


@torch.inference_mode()  # as ComfyUI runs its nodes
def applying(net, delta):
    """Patch a model with a delta and with a LoRA of rank 8 on the same layers."""
    model = torch.nn.Module()
    model.diffusion_model = net
    model.model_config = type("SD15", (), {})()
    cpu = torch.device("cpu")
    base = comfy.model_patcher.ModelPatcher(model, cpu, cpu)
    lora = base.clone()
    patches = {}
    for name, entry in delta.entries.items():
        rows, columns = entry.shape[0], torch.Size(entry.shape[1:]).numel()
        up, down = torch.randn(rows, 8) * 1e-3, torch.randn(8, columns) * 1e-3
        patches[f"diffusion_model.{name}"] = LoRAAdapter(set(), (up, down, 8.0, None, None, None))
    lora.add_patches(patches)
    delta_seconds, delta_growth = growth(lambda: patched(host.apply_delta(base, delta, 1.0)))
    base.unpatch_model()
    lora_seconds, lora_growth = growth(lambda: patched(lora))
    return {"apply_seconds": delta_seconds, "apply_bytes": delta_growth,
            "apply_lora_seconds": lora_seconds, "apply_lora_bytes": lora_growth}  # fmt: skip


def main():
    net = make_unet(sys.argv[1])
    parameters = choose_parameters(net)
    analyze(dict(list(parameters.items())[:3]), fraction=0.1)  # loads what is loaded once
    analyze_seconds, analyze_bytes = growth(lambda: analyze(parameters, fraction=0.1))
    made = []
    _, setup_bytes = growth(lambda: made.append(SaraAdamW(net, fraction=0.1)))
    (optimizer,) = made
    sizes = [len(leaf) for leaf in optimizer.parameters()]
    generator = torch.Generator().manual_seed(0)
    delta = optimizer.delta()
    optimizer.restore()
    for entry in delta.entries.values():
        entry.values.normal_(0, 1e-4, generator=generator)
    found = {"trained": sum(sizes), "parameters": sum(p.numel() for p in net.parameters()),
             "largest_layer_bytes": 4 * max(p.numel() for p in net.parameters()),
             "plain_update_seconds": plain_update(sizes), "analyze_seconds": analyze_seconds,
             "analyze_bytes": analyze_bytes, "setup_bytes": setup_bytes, **large_low_rank()}  # fmt: skip
    with tempfile.TemporaryDirectory(dir=ROOT) as folder:
        found |= files(delta, Path(folder))
    found |= applying_to_a_module(net, delta)
    found |= applying(net, delta)
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
