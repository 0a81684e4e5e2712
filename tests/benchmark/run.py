"""Measure SaRA beside its peers and beside the floors that the arithmetic sets.

Run by `python dev.py bench`. Each method has a process of its own. A second process, the dense
backward floor, takes turns with it, so that what slows the machine down slows both: times are compared
as ratios to the floor's in the same minutes. A turn is two steps of which the second counts: memory
that lay idle for a whole turn of the other is slow to touch again, which says nothing of the method.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path

from .plot import draw_benchmark

ROOT = Path(__file__).resolve().parents[2]
FLOOR = "floor-dense-backward"
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
    floor = Process(FLOOR, size, {k: v for k, v in options.items() if k in ("batch_size", "dtype")})
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


def measure_around(size):
    """Return what `around.py` measures."""
    command = [sys.executable, "-m", "tests.benchmark.around", size]
    answer = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout
    return json.loads(next(line for line in answer.splitlines() if line.startswith("{")))


def checks_around(around, step_seconds):
    """Compare what surrounds a step with what is claimed."""
    a = around
    extra = a["apply_bytes"] - a["apply_lora_bytes"]
    allowed = a["largest_layer_bytes"] + 8 * a["trained"]
    return [
        (
            f"SaRA Analyze at most 5 s on two cores: {a['analyze_seconds']:.1f} s",
            a["analyze_seconds"] <= 5,
        ),
        (
            f"analysing needs at most one layer more: {a['analyze_bytes'] / 1e6:.0f} MB of "
            f"{a['largest_layer_bytes'] / 1e6:.0f} MB",
            a["analyze_bytes"] <= a["largest_layer_bytes"],
        ),
        (
            "low-rank loss of a 10240x1280 matrix at most 10 % of the step: "
            f"{a['large_low_rank_seconds']:.2f} s",
            a["large_low_rank_seconds"] <= 0.1 * step_seconds,
        ),
        *(
            (
                f"{name} at most three times the {other} of the same bytes: "
                f"{a[f'{name}_seconds']:.2f} s, {a[f'{other}_seconds']:.2f} s",
                a[f"{name}_seconds"] <= 3 * a[f"{other}_seconds"],
            )
            for name, other in (("save", "write"), ("load", "read"))
        ),
        (
            "applying through ComfyUI at most twice as long as a LoRA of rank 8: "
            f"{a['apply_seconds']:.1f} s, {a['apply_lora_seconds']:.1f} s",
            a["apply_seconds"] <= 2 * a["apply_lora_seconds"],
        ),
        (
            f"applying needs at most one layer and the delta more than a LoRA: {extra / 1e6:.0f} MB",
            extra <= allowed,
        ),
    ]


def checks(rows, around=None):
    """Compare with what is claimed; each is a sentence, the figure and whether it holds."""
    rows = {row["method"]: row for row in rows}
    if not {"floor-frozen", FLOOR, "sara"} <= rows.keys():
        return []
    sara, frozen = rows["sara"], rows["floor-frozen"]
    per_weight = (sara["peak_bytes"] - frozen["peak_bytes"]) / sara["trained"]
    limit = frozen["peak_bytes"] * 1.05 + 20 * sara["trained"]
    update = around["plain_update_seconds"] if around else 0.0
    found = [
        (
            f"memory at most the frozen floor + 20 bytes per trained weight + 5 %: "
            f"{per_weight:.1f} bytes per trained weight above the floor",
            sara["peak_bytes"] <= limit,
        ),
        (
            "a step at most 1.10 x the dense backward floor and torch's AdamW over as many numbers: "
            f"{(sara['step_seconds'] - update) / sara['floor_step_seconds']:.2f} x, AdamW "
            f"{update:.2f} s",
            sara["step_seconds"] - update <= 1.10 * sara["floor_step_seconds"],
        ),
        (
            "low-rank loss at most 10 % of the step: "
            f"{sara['low_rank_seconds'] / sara['step_seconds']:.1%}",
            sara["low_rank_seconds"] <= 0.1 * sara["step_seconds"],
        ),
        (
            f"set-up at most two steps: {sara['setup_seconds'] / sara['step_seconds']:.2f} steps",
            sara["setup_seconds"] <= 2 * sara["step_seconds"],
        ),
    ]
    if "official-sara" in rows:
        official = rows["official-sara"]
        ratio = sara["step_ratio"] / official["step_ratio"]
        found.append((f"at most half a step of the authors' code: {ratio:.2f} x", ratio <= 0.5))
    return found + (checks_around(around, sara["step_seconds"]) if around else [])


def table(rows):
    lines = [
        "| method | trained | peak memory | bytes per trained weight | step | x floor | forward | "
        "backward | update | low rank | set-up |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    floors = {r["dtype"]: r["peak_bytes"] for r in rows if r["method"].startswith("floor-frozen")}
    for row in rows:
        above, frozen = "", floors.get(row["dtype"])
        is_plain = not row["method"].startswith("floor") and not row["method"].endswith(
            ("checkpointing", "batch-4")
        )
        if frozen and row["trained"] and is_plain:
            above = f"{(row['peak_bytes'] - frozen) / row['trained']:.1f}"
        lines.append(
            f"| {row['method']} | {row['trained'] / 1e6:.1f} M ({row['trained_fraction']:.1%}) | "
            f"{row['peak_bytes'] / 1e9:.2f} GB | {above} | {row['step_seconds']:.2f} s | "
            f"{row['step_ratio']:.2f} | {row['forward_seconds']:.2f} | {row['backward_seconds']:.2f} "
            f"| {row['optimizer_seconds']:.2f} | {row['low_rank_seconds']:.2f} | "
            f"{row['setup_seconds']:.1f} |"
        )
    return lines


def machine():
    import torch

    return (
        f"{os.cpu_count()} CPU cores ({platform.machine()}), no GPU, Python "
        f"{platform.python_version()}, torch {torch.__version__}"
    )


def write(rows, around, path, options):
    """Write benchmark.json and benchmark.md."""
    data = {"machine": machine(), "size": options.size, "steps": options.steps, "rows": rows,
            "around": around}  # fmt: skip
    path.with_suffix(".json").write_text(json.dumps(data, indent=1) + "\n")
    (path.parent / "images").mkdir(exist_ok=True)
    draw_benchmark(rows).save(path.parent / "images" / f"{path.name}.png")
    text = [
        "# What training costs",
        "",
        f"SD1.5's UNet as ComfyUI builds it ({rows[0]['parameters'] / 1e6:.0f} M parameters, random "
        "weights of standard deviation 0.02), float32, latents 4x32x32, batch 1 where nothing else "
        "is said. Every method has a process of its own; the peak is the operating system's. Times "
        f"are medians of {options.steps} turns after {options.warm_up}, taken with the dense backward "
        "floor in another process; *x floor* is the ratio of the two. Of the two steps of a turn the "
        "second counts.",
        "",
        f"Machine: {data['machine']}. Made by `python dev.py bench`.",
        "",
        *table(rows),
        "",
        "- **floor-frozen**: forward, and backward to the input alone. **floor-dense-backward**: every "
        "gradient of a matrix or convolution is made, and dropped at once; no method that looks at "
        "all weights can be faster.",
        "- **peft-shira** and **peft-supertuning** (`select_top=False`, the smallest weights) train "
        "linear layers only; peft-shira at rank 8, which is fewer weights.",
        "- **peft-lora**: rank 8 on all linear and convolution layers.",
        "- **sara-float16**, **sara-bfloat16**: weights in half precision that are cast to float32 when "
        "they are used, as ComfyUI does on this processor; the casts of all layers are held for the "
        "backward pass unless there is checkpointing. *Bytes per trained weight* are above "
        "floor-frozen of the same dtype.",
        "",
        f"![peak memory and time](images/{path.name}.png)",
        "",
        "What the figures are made of is in [cost.md](cost.md).",
        "",
        "## Claims",
        "",
        *[
            f"- {'holds' if holds else '**does not hold**'}: {text}"
            for text, holds in checks(rows, around)
        ],
        "",
    ]
    path.with_suffix(".md").write_text("\n".join(text))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="a small model, some minutes in all")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--warm-up", type=int, default=2)
    parser.add_argument("--only", help="names of rows, separated by commas")
    parser.add_argument("--out", type=Path, help="default: docs/benchmark, or nothing with --quick")
    options = parser.parse_args()
    options.size = "quick" if options.quick else "full"
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
    around = measure_around(options.size)
    for text, holds in [] if options.quick else checks(rows, around):
        print(f"{'holds' if holds else 'DOES NOT HOLD'}: {text}")
    out = options.out or (None if options.quick or options.only else ROOT / "docs" / "benchmark")
    if out:
        write(rows, around, out, options)


if __name__ == "__main__":
    main()
