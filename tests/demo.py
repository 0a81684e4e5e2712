"""Train on the shipped pictures, load and apply the result, leave pictures in output/demo/."""

import re
import shutil
import tempfile
import time
from pathlib import Path

from .harness.environment import say
from .harness.server import Server, make_base
from .harness.workflows import TRAIN, USE, load_workflow, node_titled, watch

CONCEPTS = (
    "strawberry", "red apple", "tomato", "grapes", "mushroom", "cupcake", "frog", "octopus",
)  # fmt: skip


def contact_sheet(prompt, model, conditioning_clip, negative, vae, name):
    """Add nodes that sample every demo concept with `model` and save them as one picture."""
    last = None
    for i, concept in enumerate(CONCEPTS):
        text, sample, decode, batch = (f"{name}-{part}-{i}" for part in ("t", "s", "d", "b"))
        prompt[text] = {
            "class_type": "CLIPTextEncode",
            "inputs": {"text": f"3d style, {concept}", "clip": conditioning_clip},
        }
        prompt[f"{name}-latent"] = {
            "class_type": "EmptyLatentImage",
            "inputs": {"width": 64, "height": 64, "batch_size": 1},
        }
        prompt[sample] = {
            "class_type": "KSampler",
            "inputs": {
                "model": model, "positive": [text, 0], "negative": negative,
                "latent_image": [f"{name}-latent", 0], "seed": 7, "steps": 20, "cfg": 3.0,
                "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0,
            },
        }  # fmt: skip
        prompt[decode] = {"class_type": "VAEDecode", "inputs": {"samples": [sample, 0], "vae": vae}}
        if last is None:
            last = [decode, 0]
        else:
            prompt[batch] = {
                "class_type": "ImageBatch", "inputs": {"image1": last, "image2": [decode, 0]}
            }  # fmt: skip
            last = [batch, 0]
    prompt[f"{name}-list"] = {
        "class_type": "RebatchImages", "inputs": {"images": last, "batch_size": 1}
    }  # fmt: skip
    prompt[f"{name}-grid"] = {
        "class_type": "ImageGrid",
        "inputs": {
            "images": [f"{name}-list", 0], "columns": 4, "cell_width": 128, "cell_height": 128,
            "padding": 4,
        },
    }  # fmt: skip
    prompt[f"{name}-sheet"] = {
        "class_type": "SaveImage",
        "inputs": {"images": [f"{name}-grid", 0], "filename_prefix": name},
    }


def run(out):
    """Make the demo's files in `out`, in a ComfyUI of its own."""
    out.mkdir(parents=True, exist_ok=True)
    started = time.time()
    with tempfile.TemporaryDirectory() as scratch:
        base = Path(scratch)
        make_base(base)
        say("Starting ComfyUI")
        with Server(base) as server:
            name = train(server, out)
            shutil.copyfile(base / "output" / "sara" / name, out / "fluent3d.safetensors")
            use(server, name, out)
    say(f"Done in {time.time() - started:.0f} seconds; look at {out}:")
    print("  before.png, after.png   the same prompts and seeds without and with the delta")
    print("  loss.png, weights.png   loss of the training; magnitudes of the model's weights")
    print("  report.txt              how large they are, block by block")
    print("  fluent3d.safetensors    what was learned")
    print("  concepts: " + ", ".join(CONCEPTS))


def train(server, out):
    """Run the first example, keep its report and plots, and return the delta's name."""
    prompt = load_workflow(server, TRAIN)
    training = node_titled(prompt, "SaRA Train")
    model = prompt[training]["inputs"]["model"]
    prompt["analyze"] = {"class_type": "SaraAnalyze", "inputs": {
        "model": model, "threshold": 0.0, "fraction": 0.1, "count": "", "include": "", "exclude": "",
        "zeros": "auto",
    }}  # fmt: skip
    prompt["weights"] = {"class_type": "PreviewImage", "inputs": {"images": ["analyze", 3]}}
    prompt["loss"] = {
        "class_type": "LossGraphNode",
        "inputs": {"loss": [training, 2], "filename_prefix": "loss"},
    }
    say(f"Analyze and train: {prompt[training]['inputs']['steps']} steps on 40 pictures")
    outputs = watch(server, prompt)
    (out / "report.txt").write_text(outputs["analyze"]["text"][0], encoding="utf-8")
    for node in ("loss", "weights"):
        image = outputs[node]["images"][0]
        (out / f"{node}.png").write_bytes(server.picture(image))
    return re.search(r"saved (\S+),", outputs[training]["text"][0])[1]


def use(server, name, out):
    """Load and apply a delta as the second example does, and sample the demo's concepts."""
    say("Load, apply and sample concepts that were not among the pictures")
    prompt = load_workflow(server, USE)
    prompt[node_titled(prompt, "Load SaRA Delta")]["inputs"]["delta_name"] = name
    sampler = prompt[node_titled(prompt, "KSampler")]["inputs"]
    loader = node_titled(prompt, "Load Checkpoint")
    base_model = prompt[node_titled(prompt, "Apply SaRA")]["inputs"]["model"]
    for sheet, model in (("before", base_model), ("after", sampler["model"])):
        contact_sheet(prompt, model, [loader, 1], sampler["negative"], [loader, 2], sheet)
    outputs = watch(server, prompt)
    for sheet in ("before", "after"):
        image = outputs[f"{sheet}-sheet"]["images"][0]
        (out / f"{sheet}.png").write_bytes(server.picture(image))
