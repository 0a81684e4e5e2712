"""Several sets of pictures in one run, and several prompts in one box."""

import csv

import pytest
import torch
from PIL import Image

from ..harness.server import PromptError
from .builders import pairs
from .graphs import Graph, emoji64
from .test_image_folder import folder_node, make, noise


def test_two_sets_become_one_with_their_repeats_names_and_masks(sara):
    from sara_pack.nodes.pictures.join import SaraJoinPictures

    latents, captions = pairs(3)
    (tall,), (other,) = pairs(1, size=6, seed=5)
    mask = torch.rand(1, 6, 6)
    one = [{"samples": torch.cat(latents), "sara_picture": "p", "sara_name": "a.png"}]
    found = SaraJoinPictures.execute(
        one, [[caption] for caption in captions], [{"samples": tall}], [[other]], [1], [2],
        masks_2=[mask],
    ).args  # fmt: skip
    latents_out, positive, masks = found
    assert [entry["samples"].shape[-1] for entry in latents_out] == [8, 8, 8, 6, 6]
    assert all(c[0][0] is o[0] for c, o in zip(positive, [*captions, other, other], strict=True))
    assert [bool((m == 1).all()) for m in masks] == [True] * 3 + [False] * 2
    assert torch.equal(masks[4], mask)
    examples = sara.examples.gather_examples(latents_out, positive, None, masks, None, None)
    assert examples.labels == ["a.png"] * 3 + ["picture 1"] * 2
    assert examples.names[0] == "p"
    training, held_out = sara.examples.split_validation(examples, 0.5, 0)
    assert len(held_out) == (1 if held_out[0] > 2 else 3)  # repeats of one picture stay together


def test_sets_that_do_not_fit_are_explained(sara):
    from sara_pack.nodes.pictures.join import SaraJoinPictures

    latents, captions = pairs(3)
    batch = [{"samples": torch.cat(latents)}]
    with pytest.raises(ValueError, match="3 pictures but 2 captions are connected"):
        SaraJoinPictures.execute(batch, [[c] for c in captions[:2]], batch, [captions], [1], [1])


def test_masks_that_latents_carry_are_kept(sara):
    from sara_pack.nodes.pictures.join import SaraJoinPictures

    latents, captions = pairs(2)
    mask = torch.rand(1, 8, 8)
    one, two = ([{"samples": latent}] for latent in latents)
    one[0]["noise_mask"] = mask
    joined, positive, masks = SaraJoinPictures.execute(
        one, [[captions[0]]], two, [[captions[1]]], [1], [1]
    ).args
    assert torch.equal(masks[0], mask)
    examples = sara.examples.gather_examples(joined, positive, None, None, None, None)
    assert torch.equal(examples.masks[0], mask)
    assert bool((examples.masks[1] == 1).all())


def test_rows_before_come_once_however_many_prompts_there_are():
    from sara_pack.nodes.sampling.sampling_nodes import SaraSamplingSettings

    def sampling(prompts, **more):
        values = {"vae": "v", "negative": "n", "seed": 1, "steps": 2, "cfg": 3.0, "sampler_name": "euler", "scheduler": "simple"}  # fmt: skip
        given = {name: [value] for name, value in values.items()}
        return SaraSamplingSettings.execute(positive=prompts, **given, **more).args[0]

    first = sampling(["a"])
    rows = sampling(["b", "c"], previous=[first], latent=["one", "two"])
    assert [(row.positive, row.latent) for row in rows] == [("a", None), ("b", "one"), ("c", "two")]


def test_two_folders_train_in_one_run_and_each_prompt_is_a_row(server):
    for name, count in (("joined_few", 2), ("joined_many", 4)):
        folder = make(server, name, **{f"{i}.png": noise(64, 64, 70 + i) for i in range(count)})
        for i in range(count):
            (folder / f"{i}.txt").write_text(f"{name} {i}")
    graph = Graph(server)
    checkpoint, model, empty = emoji64(graph)
    few, many = (
        folder_node(graph, checkpoint, f"input/{name}") for name in ("joined_few", "joined_many")
    )
    both = graph(
        "SaraJoinPictures", latents=few, positive=few.out(1), masks=few.out(2), repeats=2,
        latents_2=many, positive_2=many.out(1), repeats_2=1,
    )  # fmt: skip
    prompts = graph(
        "SaraPrompts",
        clip=checkpoint.out(1),
        prompts="a fruit\n\n  an animal\na hat",
        before="3d style,",
    )
    latent = graph("EmptySD3LatentImage", width=64, height=64, batch_size=2)
    sampling = graph(
        "SaraSampling", vae=checkpoint.out(2), positive=prompts, negative=empty, latent=latent,
        steps=2, cfg=2.0, sampler_name="euler", scheduler="simple",
    )  # fmt: skip
    train = graph(
        "SaraTrain", model=model, latents=both, positive=both.out(1), masks=both.out(2),
        preview=sampling, preview_every_steps=2, epochs=2, steps=77, batch_size=3,
        output_name="joined",
    )  # fmt: skip
    graph("PreviewAny", source=prompts.out(1))
    assert "saved joined_00001/joined_6_steps" in graph.run()[train]["text"][0]  # 2 x 8 / 3
    run = server.base / "output" / "sara" / "joined_00001"
    assert len(list(csv.DictReader((run / "loss.csv").open()))) == 6
    with Image.open(run / "previews" / "preview_0000002_steps.png") as sheet:
        width, height = sheet.size
    assert width >= 2 * 64
    assert height >= 3 * 64


def test_an_empty_box_of_prompts_is_explained(server):
    graph = Graph(server)
    checkpoint, _, _ = emoji64(graph)
    prompts = graph("SaraPrompts", clip=checkpoint.out(1), prompts=" \n", before="x")
    graph("PreviewAny", source=prompts.out(1))
    with pytest.raises(PromptError, match="prompts is empty; write at least one line"):
        graph.run()
