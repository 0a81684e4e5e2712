"""Example workflows of other families, run with miniatures under the names of the files that they load."""

import csv

import pytest
from PIL import Image, ImageOps
from safetensors.torch import save_file

from ..examples.families import KONTEXT, WAN, WAN_VAE
from ..harness.workflows import load_workflow, node_titled
from . import zoo
from .models import wan_vae_weights
from .test_image_folder import make, noise
from .test_videos import write_video

EDIT, VIDEOS = "8 Train an edit", "9 Train on videos"


def link(prompt, old, new):
    """Have what a node puts out come from elsewhere."""
    for node in prompt.values():
        for name, value in node["inputs"].items():
            if isinstance(value, list) and value[0] == old:
                node["inputs"][name] = new


def of_kind(prompt, kind):
    """Id of the only node of a class."""
    (key,) = [key for key, node in prompt.items() if node["class_type"] == kind]
    return key


def take_from_emoji64(prompt, **slots):
    """Take outputs of emoji64's checkpoint in place of some loaders'."""
    loader = {"ckpt_name": "emoji64.safetensors"}
    prompt["emoji64"] = {"class_type": "CheckpointLoaderSimple", "inputs": loader}
    for kind, slot in slots.items():
        key = of_kind(prompt, kind)
        del prompt[key]
        link(prompt, key, ["emoji64", slot])


def set_nodes(prompt, **values):
    """Set widgets of all nodes of a class."""
    for node in prompt.values():
        node["inputs"] |= values.get(node["class_type"], {})


def losses_of(server, run):
    with open(server.base / "output" / "sara" / run / "loss.csv", newline="") as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


def trained(server, prompt):
    """Run a workflow; returns the outputs of SaRA Train, its run's folder, and the losses."""
    outputs = server.run(prompt)[node_titled(prompt, "SaRA Train")]
    run = outputs["text"][0].split()[1].partition("/")[0]
    return outputs, server.base / "output" / "sara" / run, losses_of(server, run)


def small_edit(server):
    """The example of edits, set for a few small pictures and a miniature of Flux Kontext."""
    zoo.write(zoo.KONTEXT, server.base / "models" / "diffusion_models" / KONTEXT["name"])
    before = {f"{i}.png": noise(64, 64, 500 + i) for i in range(3)}
    make(server, "before_edit", **before)
    make(server, "after_edit", **{name: ImageOps.invert(image) for name, image in before.items()})
    Image.new("RGB", (64, 64), "red").save(server.base / "input" / "example.png")
    prompt = load_workflow(server, EDIT)
    take_from_emoji64(prompt, DualCLIPLoader=1, VAELoader=2)
    image = of_kind(prompt, "LoadImage")
    link(prompt, of_kind(prompt, "FluxKontextImageScale"), [image, 0])  # else a million pixels
    set_nodes(
        prompt,
        SaraImageFolder={"folder": "input/after_edit"},
        SaraReferencePictures={"folder": "input/before_edit"},
        SaraSampling={"steps": 1},
        SaraTrain={
            "steps": 1, "batch_size": 1, "learning_rate": 1e-4, "output_name": "edit",
            "caption_dropout": 0.0, "fraction": 0.01,
        },
    )  # fmt: skip
    return prompt


def test_the_example_of_an_edit_trains_with_its_references(server):
    prompt = small_edit(server)
    outputs, folder, with_references = trained(server, prompt)
    (chart,) = outputs["sara_training"]
    assert chart["status"] == "finished"
    assert len(list((folder / "previews").iterdir())) == 2
    train, images = (node_titled(prompt, name) for name in ("SaRA Train", "After the edit"))
    prompt[train]["inputs"]["positive"] = [images, 1]
    del prompt[train]["inputs"]["preview"]
    _, _, without = trained(server, prompt)
    assert len(with_references) == len(without) == 1
    assert with_references[0] != pytest.approx(without[0], rel=1e-5)  # the same noise and picture


def test_the_example_of_videos_trains_on_clips_and_pictures(server):
    models, folder = server.base / "models", server.base / "input" / "clips"
    (models / "vae").mkdir(exist_ok=True)
    save_file(wan_vae_weights(), models / "vae" / WAN_VAE["name"])
    zoo.write("Wan 2.1", models / "diffusion_models" / WAN["name"])
    folder.mkdir()
    write_video(folder / "a.mkv", 12)
    (folder / "a.txt").write_text("a film")
    prompt = load_workflow(server, VIDEOS)
    take_from_emoji64(prompt, CLIPLoader=1)
    sampling = node_titled(prompt, "SaRA Sampling")
    prompt[sampling]["inputs"]["latent"] = [of_kind(prompt, "EmptyHunyuanLatentVideo"), 0]
    set_nodes(
        prompt,
        SaraVideoFolder={"folder": "input/clips", "size": 64, "frames": 9, "max_upscale": 2.0},
        EmptyHunyuanLatentVideo={"width": 64, "height": 64, "length": 9},
        SaraSampling={"steps": 1},
        SaraTrain={"steps": 42, "batch_size": 1, "output_name": "film", "training_dtype": "fp32"},
    )
    outputs, folder, losses = trained(server, prompt)
    (chart,) = outputs["sara_training"]
    assert chart["status"] == "finished"
    assert len(losses) == 42  # 40 pictures and one clip twice
    (last,) = (folder / "previews").glob("*_0000042_steps.png")
    width, height = Image.open(last).size
    assert height == 64
    assert width > 2 * 64  # frames beside each other
