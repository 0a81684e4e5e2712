"""Write what was measured: docs/benchmark.json, docs/benchmark.md and a plot."""

import json
import os
import platform

from .plot import draw_benchmark

FLOOR = "floor-dense-backward"
GROWTH = ("sara-0.6%", "sara-2%", "sara-5%", "sara", "sara-20%")
NOTES = """
- **floor-frozen**: forward, and backward to the input alone. **floor-dense-backward**: every gradient of a matrix or convolution is made whole, and dropped at once. SaRA makes those of large convolutions in parts, so that it can be below.
- **peft-shira** and **peft-supertuning** (`select_top=False`, the smallest weights) train linear layers only; peft-shira at rank 8, which is fewer weights.
- **peft-lora**: rank 8 on all linear and convolution layers.
- **...-moments-8bit**: AdamW's moments in eight bits; torchao, imported for their map, takes up to 170 MB of its own.
- **...-float16**, **...-bfloat16**, **...-float8**: weights in 16 or 8 bits (e4m3fn with a scale) of which float32 numbers are made when they are used, as ComfyUI does on this processor; the floor beside float8 is float32's. **...-offloaded**: float32 weights that are copied when they are used, as from main memory to a graphics card; here the copies are in the same memory. floor-frozen holds the casts and copies of all layers until the backward pass, as ordinary training does; SaRA's trainer makes them again, so that it can need less than that floor. *Bytes per trained weight* are above floor-frozen of the same weights.
""".strip()  # noqa: E501


def machine():
    """Return the machine in general terms."""
    import torch

    return (
        f"{os.cpu_count()} CPU cores ({platform.machine()}), no GPU, Python "
        f"{platform.python_version()}, torch {torch.__version__}"
    )


def checks(data):
    """Compare with what is claimed; each is a sentence with the figure, and whether it holds."""
    rows = {row["method"]: row for row in data["rows"]}
    found = []
    if {"floor-frozen", FLOOR, "sara"} <= rows.keys():
        found += checks_of_steps(rows, data.get("around"))
        found += checks_of_eight_bits(rows, data.get("around"))
    if data.get("around"):
        found += checks_around(data["around"])
        seconds = data["around"]["large_low_rank_seconds"]
        if "sara" in rows:
            found.append((
                f"low-rank loss of a 10240x1280 matrix at most 10 % of the step: {seconds:.2f} s; by "
                f"products, as on a graphics card, {data['around']['large_low_rank_products_seconds']:.2f} "
                f"s; its SVD takes {data['around']['large_svd_seconds']:.2f} s",
                seconds <= 0.1 * rows["sara"]["step_seconds"],
            ))  # fmt: skip
    found += checks_over_processes(data.get("processes", ()))
    return found + checks_in_comfyui(rows)


def checks_of_steps(rows, around):
    """Check memory, time of a step and set-up."""
    sara, frozen = rows["sara"], rows["floor-frozen"]
    per_weight = (sara["peak_bytes"] - frozen["peak_bytes"]) / sara["trained"]
    limit = frozen["peak_bytes"] * 1.05 + 20 * sara["trained"]
    update = around["plain_update_seconds"] if around else 0.0
    of_floor = (sara["step_seconds"] - update) / sara["floor_step_seconds"]
    low_rank = sara["low_rank_seconds"] / sara["step_seconds"]
    set_up = sara["setup_seconds"] / sara["step_seconds"]
    found = [
        (
            "memory at most the frozen floor + 20 bytes per trained weight + 5 %: "
            f"{per_weight:.1f} bytes per trained weight above the floor",
            sara["peak_bytes"] <= limit,
        ),
        (
            "a step at most 1.10 x the dense backward floor and torch's AdamW over as many numbers: "
            f"{of_floor:.2f} x, AdamW {update:.2f} s",
            of_floor <= 1.10,
        ),
        (f"low-rank loss at most 10 % of the step: {low_rank:.1%}", low_rank <= 0.1),
        (f"set-up at most two steps: {set_up:.2f} steps", set_up <= 2),
    ]
    if "official-sara" in rows:
        official = rows["official-sara"]["step_ratio"]
        found.append((
            f"at most half a step of the authors' code: {sara['step_ratio'] / official:.2f} x; the "
            f"dense backward floor alone is {1 / official:.2f} x",
            sara["step_ratio"] <= 0.5 * official,
        ))  # fmt: skip
    return found


def checks_of_eight_bits(rows, around):
    """Check memory and time of a base that stays in eight bits."""
    found, frozen = [], rows["floor-frozen"]
    compared = (("sara-float8", "sara", 17), ("sara-float8-moments-8bit", "sara-moments-8bit", 11))
    for name, in_float32, per_weight in compared:
        if name not in rows or in_float32 not in rows or not around:
            continue
        row = rows[name]
        others = frozen["peak_bytes"] - 4 * row["parameters"]
        least = (
            others + row["parameters"] + around["largest_layer_bytes"] + per_weight * row["trained"]
        )
        times = row["step_ratio"] / rows[in_float32]["step_ratio"]
        found += [
            (
                f"{name}: memory at most that of activations, weights in 8 bits, one layer and "
                f"{per_weight} bytes per trained weight, 5 % over: {row['peak_bytes'] / least - 1:+.1%}",
                row["peak_bytes"] <= 1.05 * least,
            ),
            (
                f"{name}: a step at most 1.5 x that of the same model in float32: {times:.2f} x",
                times <= 1.5,
            ),
        ]
    return found


def checks_around(a):
    """Check analysing, saving, loading and applying."""
    extra = a["apply_bytes"] - a["apply_lora_bytes"]
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
            "set-up needs at most one layer more than base values and positions, of 9 bytes: "
            f"{(a['setup_bytes'] - 9 * a['trained']) / 1e6:.0f} MB more",
            a["setup_bytes"] - 9 * a["trained"] <= a["largest_layer_bytes"],
        ),
        *(
            (
                f"{name} at most three times the {other} of the same {a['file_bytes'] / 1e6:.0f} MB: "
                f"{a[f'{name}_seconds']:.2f} s, {a[f'{other}_seconds']:.2f} s",
                a[f"{name}_seconds"] <= 3 * a[f"{other}_seconds"],
            )
            for name, other in (("save", "write"), ("load", "read"))
        ),
        (
            "applying to a module at most three times a pass that reads and writes all its weights: "
            f"{a['apply_to_seconds']:.2f} s, {a['touch_seconds']:.2f} s",
            a["apply_to_seconds"] <= 3 * a["touch_seconds"],
        ),
        (
            "applying through ComfyUI at most twice as long as a LoRA of rank 8: "
            f"{a['apply_seconds']:.1f} s, {a['apply_lora_seconds']:.1f} s",
            a["apply_seconds"] <= 2 * a["apply_lora_seconds"],
        ),
        (
            f"applying needs at most one layer and the delta more than a LoRA: {extra / 1e6:.0f} MB",
            extra <= a["largest_layer_bytes"] + 8 * a["trained"],
        ),
    ]


def checks_in_comfyui(rows):
    """Check the node against core's Train LoRA."""
    found = []
    if {"sara-in-comfyui-small", "comfyui-train-lora-small"} <= rows.keys():
        ours, lora = rows["sara-in-comfyui-small"], rows["comfyui-train-lora-small"]
        ratio = ours["step_seconds"] / lora["step_seconds"]
        text = f"on emoji64 a step of SaRA Train at most 0.25 x Train LoRA's: {ratio:.2f} x"
        found.append((text, ratio <= 0.25))
    if {"sara-in-comfyui", "comfyui-train-lora"} <= rows.keys():
        ours, lora = rows["sara-in-comfyui"]["peak_bytes"], rows["comfyui-train-lora"]["peak_bytes"]
        text = (
            "peak memory of SaRA Train not above Train LoRA's at rank 8: "
            f"{ours / 1e9:.2f} GB, {lora / 1e9:.2f} GB"
        )
        found.append((text, ours <= lora))
    return found


def table(rows):
    """Return the lines of the table of methods."""
    lines = [
        "| method | trained | peak memory | bytes per trained weight | step | x floor | forward | "
        "backward | update | low rank | set-up |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    floors = {r["dtype"]: r["peak_bytes"] for r in rows
              if r["method"] in ("floor-frozen", "floor-frozen-float16")}  # fmt: skip
    for row in rows:
        above, frozen = "", floors.get(row["dtype"])
        is_plain = not row["method"].startswith("floor") and not row["method"].endswith(
            ("checkpointing", "batch-4", "offloaded")
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


def growth(rows):
    """Return the lines on how cost grows with the trained fraction and the batch."""
    rows = {row["method"]: row for row in rows}
    if "floor-frozen" not in rows:
        return []
    lines = [
        "## How cost grows",
        "",
        "| trained | memory above floor-frozen | step, x dense backward floor | update |",
        "|---|---|---|---|",
    ]
    for row in (rows[name] for name in GROWTH if name in rows):
        above = (row["peak_bytes"] - rows["floor-frozen"]["peak_bytes"]) / 1e9
        lines.append(
            f"| {row['trained_fraction']:.1%} | {above:.2f} GB | {row['step_ratio']:.2f} | "
            f"{row['optimizer_seconds']:.2f} s |"
        )
    if "sara-batch-4" in rows:
        lines += ["", "| batch | dense backward floor | SaRA, 10 % | x floor | peak memory |",
                  "|---|---|---|---|---|"]  # fmt: skip
        for batch, name in ((1, "sara"), (4, "sara-batch-4")):
            row = rows[name]
            lines.append(
                f"| {batch} | {row['floor_step_seconds']:.2f} s | {row['step_seconds']:.2f} s | "
                f"{row['step_ratio']:.2f} | {row['peak_bytes'] / 1e9:.2f} GB |"
            )
    return [*lines, ""]


def in_comfyui(rows):
    """Return the lines on what was measured through ComfyUI's executor."""
    if not rows:
        return []
    lines = [
        "## Through ComfyUI",
        "",
        f"SaRA Train and core's Train LoRA (rank 8) in ComfyUI {rows[0]['comfyui']}, float32, a server "
        "each: *small* on emoji64 and its 40 pictures in batches of 8, the others on SD1.5's UNet and "
        "one latent of 4x32x32. The peak is the whole server's. Made by `python dev.py bench "
        "--executor` and `--executor --full`.",
        "",
        "| method | trained | step | peak memory | above what was held before |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['method']} | {row['trained'] / 1e6:.2f} M ({row['trained_fraction']:.1%}) | "
            f"{row['step_seconds']:.2f} s | {row['peak_bytes'] / 1e9:.2f} GB | "
            f"{row['grown_bytes'] / 1e9:.2f} GB |"
        )
    return [*lines, ""]


def over_processes(rows):
    """Return the lines on what processes that train together send."""
    if not rows:
        return []
    lines = [
        "## Over processes",
        "",
        f"{rows[0]['processes']} processes on this machine with gloo, one thread each, float32, one latent of "
        "4x16x16 each. *Sent* is what each gives to all-reduce in a step; *sending* is how much longer a "
        "forward and backward pass takes with it. ddp-dense and ddp-lora (rank 8) are PyTorch's "
        "DistributedDataParallel over all weights and over PEFT's. Made by `python dev.py bench "
        "--processes --full`.",
        "",
        "| method | trained | sent | per trained weight | pass | sending |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['method']} | {row['trained'] / 1e6:.2f} M | {row['sent_bytes'] / 1e6:.1f} MB | "
            f"{row['bytes_per_trained']:.2f} bytes | {row['pass_seconds']:.2f} s | "
            f"{row['sending_pass_seconds'] - row['pass_seconds']:.2f} s |"
        )
    return [*lines, ""]


def checks_over_processes(rows):
    """Check what is sent."""
    by_name = {row["method"]: row for row in rows}
    if not {"sara", "ddp-dense"} <= by_name.keys():
        return []
    sara, dense = by_name["sara"], by_name["ddp-dense"]
    share = sara["sent_bytes"] / dense["sent_bytes"]
    return [
        (
            "processes send at most 4.1 bytes a trained weight and step: "
            f"{sara['bytes_per_trained']:.3f}",
            sara["bytes_per_trained"] <= 4.1,
        ),
        (f"a tenth of the dense gradients: {share:.3f}", share <= 0.1001),
    ]


def write(data, path):
    """Write benchmark.json, benchmark.md and the plot."""
    path.with_suffix(".json").write_text(json.dumps(data, indent=1) + "\n")
    (path.parent / "images").mkdir(exist_ok=True)
    rows = [row for row in data["rows"] if "comfyui" not in row]
    draw_benchmark(rows).save(path.parent / "images" / f"{path.name}.png")
    text = [
        "# What training costs",
        "",
        f"SD1.5's UNet as ComfyUI builds it ({rows[0]['parameters'] / 1e6:.0f} M parameters, random "
        "weights of standard deviation 0.02), float32, latents 4x32x32, batch 1 where nothing else "
        "is said. Every method has a process of its own; the peak is the operating system's. Times "
        f"are medians of {data['steps']} turns after {data['warm_up']}, taken with the dense backward "
        "floor in another process; *x floor* is the ratio of the two. Of the two steps of a turn the "
        "second counts.",
        "",
        f"Machine: {data['machine']}. Made by `python dev.py bench`.",
        "",
        *table(rows),
        "",
        NOTES,
        "",
        f"![peak memory and time](images/{path.name}.png)",
        "",
        *growth(rows),
        *in_comfyui([row for row in data["rows"] if "comfyui" in row]),
        *over_processes(data.get("processes")),
        "What the figures are made of is in [cost.md](cost.md).",
        "",
        "## Claims",
        "",
        *[f"- {'holds' if holds else '**does not hold**'}: {text}" for text, holds in checks(data)],
        "",
    ]
    path.with_suffix(".md").write_text("\n".join(text))
