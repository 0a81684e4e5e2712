"""An inpainting model trains with what InpaintModelConditioning makes of pictures and masks."""

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from ..assets.emoji64 import assemble
from .graphs import Graph
from .test_image_folder import folder_node, make, noise
from .test_workflows_of_families import losses_of

FIRST = "model.diffusion_model.input_blocks.0.0.weight"


@pytest.fixture
def inpainting(server):
    """emoji64-unet with the five further channels that an inpainting model is given."""
    path = server.base / "models" / "checkpoints" / "inpainting.safetensors"
    assemble.assemble_unet(path)
    state = load_file(path)
    shape = (state[FIRST].shape[0], 5, 3, 3)
    more = 0.05 * torch.randn(shape, generator=torch.Generator().manual_seed(0))
    state[FIRST] = torch.cat([state[FIRST], more.to(state[FIRST].dtype)], 1)
    save_file(state, path)
    yield path.name
    path.unlink()


def half_masked(files):
    """Masks of pictures: white on the left, where is to be painted."""
    masks = {}
    for name in files:
        masks[name] = Image.new("L", (64, 64))
        masks[name].paste(255, (0, 0, 32, 64))
    return masks


def test_pictures_and_masks_go_through_comfyuis_node_into_the_training(server, sara, inpainting):
    pictures = {f"{i}.png": noise(64, 64, 600 + i) for i in range(3)}
    make(server, "whole", **pictures)
    make(server, "masks", **half_masked(pictures))

    def train(name, masked):
        graph = Graph(server)
        checkpoint = graph("CheckpointLoaderSimple", ckpt_name=inpainting)
        data = folder_node(graph, checkpoint, "input/whole", default_caption="noise", flip=True)
        positive = data.out(1)
        if masked:
            own, masks = (
                graph("SaraReferencePictures", latents=data, folder=f"input/{folder}")
                for folder in ("whole", "masks")
            )
            positive = graph(
                "InpaintModelConditioning", positive=data.out(1), negative=data.out(3),
                vae=checkpoint.out(2), pixels=own, mask=graph("ImageToMask", image=masks, channel="red"),
                noise_mask=False,
            )  # fmt: skip
        node = graph(
            "SaraTrain", model=checkpoint, latents=data, positive=positive, empty=data.out(3), steps=3,
            batch_size=6, learning_rate=1e-3, output_name=name, caption_dropout=0.5,
        )  # fmt: skip
        saved = graph.run()[node]["text"][0].split()[1].rstrip(",")
        losses = losses_of(server, saved.partition("/")[0])
        return losses, server.base / "output" / "sara" / saved

    losses, path = train("inpainted", masked=True)
    entries = sara.core.SparseDelta.load(path).entries
    (entry,) = [e for name, e in entries.items() if name.endswith("input_blocks.0.0.weight")]
    assert tuple(entry.shape)[1:] == (9, 3, 3)
    channels = entry.index // 9 % 9
    assert (channels >= 4).any()  # of what only an inpainting model is given
    everything, _ = train("all_masked", masked=False)
    assert len(losses) == len(everything) == 3
    assert losses[0] != pytest.approx(everything[0], rel=1e-4)
