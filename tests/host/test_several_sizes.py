"""SaRA Image Folder with more than one size, and a training on what it puts out."""

import pytest
import torch

from ..harness.server import PromptError
from .graphs import Graph, emoji64
from .test_image_folder import folder_node, make, noise, run_folder, saved


def test_every_picture_comes_at_every_size_as_if_that_were_the_only_one(server):
    make(server, "sizes", **{f"{i}.png": noise(96, 64, 300 + i) for i in range(3)})
    both, _ = run_folder(server, "input/sizes", "sizes_both", more_sizes="48, 64")
    assert "3 pictures, 6 entries in an epoch" in both["text"][0]
    for size in (64, 48):
        run_folder(server, "input/sizes", f"sizes_{size}", size=size)
    found = saved(server, "sizes_both")
    assert len(found) == 6
    for place, size in enumerate((64, 48)):
        alone = saved(server, f"sizes_{size}")
        assert len({tuple(latent.shape) for latent in alone}) == 1
        for ours, reference in zip(found[place::2], alone, strict=True):
            assert torch.equal(ours, reference)


def test_a_picture_too_small_for_a_size_comes_once_at_the_smaller_one(server):
    make(server, "small_sizes", **{"a.png": noise(40, 40, 310), "b.png": noise(64, 64, 311)})
    outputs, _ = run_folder(server, "input/small_sizes", "small_sizes", more_sizes="48")
    assert "2 pictures, 3 entries in an epoch" in outputs["text"][0]
    sides = [tuple(latent.shape[-2:]) for latent in saved(server, "small_sizes")]
    assert sides == [(6, 6), (8, 8), (6, 6)]


def test_pictures_too_small_for_all_sizes_are_named(server):
    make(server, "tiny_sizes", **{"a.png": noise(16, 16, 320), "b.png": noise(128, 128, 321)})
    outputs, _ = run_folder(
        server, "input/tiny_sizes", "tiny_sizes", size=256, more_sizes="128", max_upscale=1.0
    )
    assert "a.png: it is too small, 16x16 pixels, for 128" in outputs["text"][0]


def test_text_that_is_no_size_is_refused(server):
    with pytest.raises(PromptError, match="more_sizes holds 'large'; expected sides in pixels"):
        run_folder(server, "input/fluent3d", more_sizes="48, large")


def test_a_run_takes_batches_of_each_size(server):
    graph = Graph(server)
    checkpoint, model, _ = emoji64(graph)
    data = folder_node(graph, checkpoint, "input/fluent3d", more_sizes="48")
    train = graph(
        "SaraTrain", model=model, latents=data, positive=data.out(1), steps=1, batch_size=40, epochs=1,
        validation_split=0.1, output_name="sizes",
    )  # fmt: skip
    outputs = graph.run()[train]
    assert "saved sizes_00001" in outputs["text"][0]
    (chart,) = outputs["sara_training"]
    assert chart["steps"] == 2  # 36 pictures that are learned at each of two sizes
