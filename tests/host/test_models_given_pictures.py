"""Models that are given pictures beside the noise train with what ComfyUI's nodes make of references."""

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from ..assets.emoji64 import assemble
from .graphs import Graph
from .test_image_folder import folder_node, make, noise
from .test_workflows_of_families import losses_of

FIRST = "model.diffusion_model.input_blocks.0.0.weight"
CHANNELS = {"inpainting": 9, "edits by instruction": 8}


@pytest.fixture
def given_pictures(server, request):
    """emoji64-unet with the further channels of such a model."""
    name = request.param.replace(" ", "_")  # the server remembers files by name
    path = server.base / "models" / "checkpoints" / f"{name}.safetensors"
    assemble.assemble_unet(path)
    state = load_file(path)
    first = state[FIRST]
    shape = (first.shape[0], CHANNELS[request.param] - first.shape[1], 3, 3)
    more = 0.05 * torch.randn(shape, generator=torch.Generator().manual_seed(0))
    state[FIRST] = torch.cat([first, more.to(first.dtype)], 1)
    save_file(state, path)
    yield request.param, path.name
    path.unlink()


def half_masked(files):
    """Masks of pictures: white on the left, where is to be painted."""
    masks = {}
    for name in files:
        masks[name] = Image.new("L", (64, 64))
        masks[name].paste(255, (0, 0, 32, 64))
    return masks


@pytest.fixture(scope="module")
def folders(server):
    pictures = {f"{i}.png": noise(64, 64, 600 + i) for i in range(3)}
    make(server, "whole", **pictures)
    make(server, "masks", **half_masked(pictures))


def conditioned(graph, kind, checkpoint, data):
    """What ComfyUI's node makes of captions and references, picture by picture."""
    own, masks = (
        graph("SaraReferencePictures", latents=data, folder=f"input/{folder}")
        for folder in ("whole", "masks")
    )
    common = {"positive": data.out(1), "negative": data.out(3), "vae": checkpoint.out(2)}
    if kind == "edits by instruction":
        return graph("InstructPixToPixConditioning", pixels=own, **common)
    mask = graph("ImageToMask", image=masks, channel="red")
    return graph("InpaintModelConditioning", pixels=own, mask=mask, noise_mask=False, **common)


@pytest.mark.parametrize("given_pictures", CHANNELS, indirect=True)
def test_references_go_through_comfyuis_node_into_the_training(
    server, sara, given_pictures, folders
):
    kind, file = given_pictures

    def train(name, with_references):
        graph = Graph(server)
        checkpoint = graph("CheckpointLoaderSimple", ckpt_name=file)
        data = folder_node(graph, checkpoint, "input/whole", default_caption="noise", flip=True)
        positive = data.out(1)
        if with_references:
            positive = conditioned(graph, kind, checkpoint, data)
        node = graph(
            "SaraTrain", model=checkpoint, latents=data, positive=positive, empty=data.out(3), steps=3,
            batch_size=6, learning_rate=1e-3, output_name=name, caption_dropout=0.5,
        )  # fmt: skip
        saved = graph.run()[node]["text"][0].split()[1].rstrip(",")
        losses = losses_of(server, saved.partition("/")[0])
        return losses, server.base / "output" / "sara" / saved

    losses, path = train("with", True)
    entries = sara.core.SparseDelta.load(path).entries
    (entry,) = [e for name, e in entries.items() if name.endswith("input_blocks.0.0.weight")]
    count = CHANNELS[kind]
    assert tuple(entry.shape)[1:] == (count, 3, 3)
    assert (entry.index // 9 % count >= 4).any()  # of what only such a model is given
    without, _ = train("without", False)
    assert len(losses) == len(without) == 3
    assert losses[0] != pytest.approx(without[0], rel=1e-4)
