"""Measure SaRA beside its peers and beside the floors that the arithmetic sets.

Run by `python dev.py bench`. Each method has a process of its own. A second process, the dense
backward floor, takes turns with it, so that what slows the machine down slows both: times are compared
as ratios to the floor's in the same minutes. A turn is two steps of which the second counts: memory
that lay idle for a whole turn of the other is slow to touch again, which says nothing of the method.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

from .report import FLOOR, checks, machine, table, write

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("step_seconds", "forward_seconds", "backward_seconds", "optimizer_seconds",
         "low_rank_seconds")  # fmt: skip
ROWS = [  # name, method, options
    ("floor-frozen", "floor-frozen", {}),
    (FLOOR, FLOOR, {}),
    ("sara", "sara", {"fraction": 0.1}),
    ("adamw-full", "adamw-full", {}),
    ("peft-lora", "peft-lora", {}),
    ("peft-shira", "peft-shira", {}),
    ("peft-supertuning", "peft-supertuning", {"fraction": 0.1}),
    ("pytorch-optimizer-sara", "pytorch-optimizer-sara", {"fraction": 0.1}),
    ("official-sara", "official-sara", {"fraction": 0.1}),
    ("sara-no-low-rank", "sara", {"fraction": 0.1, "low_rank": 0.0}),
    ("sara-moments-8bit", "sara", {"fraction": 0.1, "moments": "8bit"}),
    ("sara-checkpointing", "sara", {"fraction": 0.1, "checkpointing": True}),
    ("sara-0.6%", "sara", {"fraction": 0.006}),
    ("sara-2%", "sara", {"fraction": 0.02}),
    ("sara-5%", "sara", {"fraction": 0.05}),
    ("sara-20%", "sara", {"fraction": 0.2}),
    ("floor-frozen-float16", "floor-frozen", {"dtype": "float16"}),
    ("sara-float16", "sara", {"fraction": 0.1, "dtype": "float16"}),
    ("sara-bfloat16", "sara", {"fraction": 0.1, "dtype": "bfloat16"}),
    ("sara-float16-checkpointing", "sara",
     {"fraction": 0.1, "dtype": "float16", "checkpointing": True}),
    ("sara-float8", "sara", {"fraction": 0.1, "dtype": "float8_e4m3fn", "zeros": "train"}),
    ("sara-float8-moments-8bit", "sara",
     {"fraction": 0.1, "dtype": "float8_e4m3fn", "zeros": "train", "moments": "8bit"}),
    ("sara-float8-checkpointing", "sara",
     {"fraction": 0.1, "dtype": "float8_e4m3fn", "zeros": "train", "checkpointing": True}),
    ("floor-frozen-offloaded", "floor-frozen", {"offloaded": True}),
    ("sara-offloaded", "sara", {"fraction": 0.1, "offloaded": True}),
    ("sara-offloaded-checkpointing", "sara",
     {"fraction": 0.1, "offloaded": True, "checkpointing": True}),
    ("floor-dense-backward-batch-4", FLOOR, {"batch_size": 4}),
    ("sara-batch-4", "sara", {"fraction": 0.1, "batch_size": 4}),
]  # fmt: skip


class Process:
    """A method at work; see `method.py`."""

    def __init__(self, method, size, options):
        command = [sys.executable, Path(__file__).with_name("method.py"), method, size,
                   json.dumps(options)]  # fmt: skip
        self.process = subprocess.Popen(
            list(map(str, command)), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.facts = self.answer()

    def answer(self):
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise RuntimeError(f"it ended with status {self.process.wait()}")

    def step(self):
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        return self.answer()

    def end(self):
        self.process.stdin.write("end\n")
        self.process.stdin.flush()
        peak = self.answer()["peak_bytes"]
        self.process.wait()
        return peak


def medians(steps):
    return {part: statistics.median(step[part] for step in steps) for part in PARTS}


def measure(name, method, options, size, num_steps, num_warm_up):
    """Measure one row beside the floor. Returns it, with the floor's medians of the same time."""
    one = Process(method, size, options)
    in_floor = (
        ("batch_size", "dtype") if "float8" not in options.get("dtype", "") else ("batch_size",)
    )
    floor = Process(FLOOR, size, {k: v for k, v in options.items() if k in in_floor})
    ours, floors = [], []
    for _ in range(num_warm_up + num_steps):
        for process, steps in ((one, ours), (floor, floors)):
            process.step()
            steps.append(process.step())
    row = {
        "method": name,
        "dtype": options.get("dtype", "float32"),
        **one.facts,
        **medians(ours[num_warm_up:]),
    }
    row["peak_bytes"] = one.end()
    row["floor_step_seconds"] = medians(floors[num_warm_up:])["step_seconds"]
    floor.end()
    row["step_ratio"] = row["step_seconds"] / row["floor_step_seconds"]
    return row


def merged(rows, old):
    """Return rows with those of an old report that were not measured anew, in the order of `ROWS`."""
    names = [row[0] for row in ROWS]
    every = {row["method"]: row for row in (*old, *rows)}
    return sorted(every.values(), key=lambda row: (*names, row["method"]).index(row["method"]))


def measure_around(size):
    """Return what `around.py` measures."""
    command = [sys.executable, "-m", "tests.benchmark.around", size]
    answer = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout
    return json.loads(next(line for line in answer.splitlines() if line.startswith("{")))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="a small model, some minutes in all")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--warm-up", type=int, default=2)
    parser.add_argument(
        "--only", help="names of rows, separated by commas; with --out, the others stay as they are"
    )
    parser.add_argument("--out", type=Path, help="default: docs/benchmark, or nothing with --quick")
    options = parser.parse_args()
    options.size = "quick" if options.quick else "full"
    out = options.out or (None if options.quick or options.only else ROOT / "docs" / "benchmark")
    rows = []
    wanted = options.only.split(",") if options.only else [row[0] for row in ROWS]
    for name, method, settings in ROWS:
        if name not in wanted or (method == "official-sara" and "SARA_OFFICIAL" not in os.environ):
            continue
        try:
            row = measure(name, method, settings, options.size, options.steps, options.warm_up)
        except RuntimeError as error:
            print(f"{name}: not measured, {error}", flush=True)
            continue
        rows.append(row)
        print(table([row])[-1], flush=True)
    print("\n".join(table(rows)))
    written = out and out.with_suffix(".json")
    old = json.loads(written.read_text()) if options.only and written and written.is_file() else {}
    data = {"machine": machine(), "size": options.size, "steps": options.steps,
            "warm_up": options.warm_up, "rows": merged(rows, old.get("rows", [])),
            "around": old.get("around") or measure_around(options.size)}  # fmt: skip
    for text, holds in [] if options.quick else checks(data):
        print(f"{'holds' if holds else 'DOES NOT HOLD'}: {text}")
    if out:
        if out.with_suffix(".json").is_file():  # what `--executor` and `--processes` measured stays
            old = json.loads(out.with_suffix(".json").read_text())
            if not options.only:
                rows += [row for row in old["rows"] if "comfyui" in row]
            data["processes"] = old.get("processes", [])
        write(data, out)


if __name__ == "__main__":
    main()
