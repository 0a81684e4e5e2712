"""Edit pairs and inpainting: pictures that belong to those of a set, and models that are given them."""

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from ..harness.server import PromptError
from . import zoo
from .builders import pairs, settings
from .graphs import Graph, emoji64
from .test_end_of_a_run import equal, run
from .test_image_folder import folder_node, keep, make, noise, saved


def encoded(graph, checkpoint, images, name):
    latent = graph("VAEEncode", pixels=images, vae=checkpoint.out(2))
    graph("SaveLatent", samples=latent, filename_prefix=f"latents/{name}")
    return latent


def references(graph, data, folder, **options):
    options = {"fit": "same window", "background": "white", **options}
    return graph("SaraReferencePictures", latents=data, folder=folder, **options)


def test_a_sets_own_pictures_come_as_they_were_encoded(server):
    make(server, "own", **{"a.png": noise(96, 70, 400), "2_b/c.png": noise(64, 90, 401)})
    graph = Graph(server)
    checkpoint, _, _ = emoji64(graph)
    data = folder_node(graph, checkpoint, "input/own", flip=True, crops=2, crop="random")
    keep(graph, data, "own")
    encoded(graph, checkpoint, references(graph, data, "input/own"), "images_of_own")
    graph.run()
    ours, images = saved(server, "own"), saved(server, "images_of_own")
    assert len(ours) == len(images) == 2 * 2 + 2 * 2 * 2
    for latent, reference in zip(ours, images, strict=True):
        torch.testing.assert_close(latent, reference, rtol=0, atol=1e-4)


def test_pictures_of_the_same_name_are_cut_alike_whatever_their_size_and_ending(server):
    small = {name: noise(80, 60, seed) for name, seed in (("a", 410), ("B", 411))}
    make(server, "after", **{f"{name}.png": picture for name, picture in small.items()})
    large = {
        name: picture.resize((240, 180), Image.Resampling.BICUBIC)
        for name, picture in small.items()
    }
    make(
        server, "before", **{"A.bmp": large["a"], "deep/x.png": noise(64, 64), "b.tiff": large["B"]}
    )
    graph = Graph(server)
    checkpoint, _, _ = emoji64(graph)
    data = folder_node(graph, checkpoint, "input/after", flip=True)
    keep(graph, data, "after")
    encoded(graph, checkpoint, references(graph, data, "input/before"), "before")
    whole = references(graph, data, "input/before", fit="whole picture")
    encoded(graph, checkpoint, whole, "whole")
    graph.run()
    ours, before, whole = (saved(server, name) for name in ("after", "before", "whole"))
    other = torch.roll(torch.stack(before), 1, 0)
    for latent, reference, wrong in zip(ours, before, other, strict=True):
        assert latent.shape == reference.shape
        assert (latent - reference).norm() < 0.5 * (latent - wrong).norm()  # mirrored as it is, too
    assert {tuple(latent.shape[-2:]) for latent in whole} == {(6, 8)}  # 64 x 48, of 240 x 180


def test_what_does_not_fit_is_named(server):
    make(server, "targets", **{"a.png": noise(64, 64, 420), "b.png": noise(64, 64, 421)})
    make(server, "few", **{"a.png": noise(64, 64, 422)})
    make(server, "wide", **{"a.png": noise(128, 64, 423), "b.png": noise(64, 64, 424)})
    for folder, message in (
        ("few", "1 of 2 pictures have none of the same name in few: b.png"),
        ("wide", "a.png is 128x64, another shape than the picture that is learned"),
    ):
        graph = Graph(server)
        checkpoint, _, _ = emoji64(graph)
        data = folder_node(graph, checkpoint, "input/targets")
        graph("PreviewImage", images=references(graph, data, f"input/{folder}"))
        with pytest.raises(PromptError, match=message):
            graph.run()


def with_references(captions, latents):
    return [
        [embedding, {**options, "reference_latents": [latent]}]
        for (embedding, options), latent in zip(captions, latents, strict=True)
    ]


@pytest.mark.parametrize("family", ["Flux dev", "Qwen-Image"])
def test_each_picture_is_seen_with_its_own_reference(sara, tmp_path, family):
    import comfy.sd

    zoo.write(family, tmp_path / "model.safetensors")
    with torch.inference_mode():
        patcher = comfy.sd.load_diffusion_model(str(tmp_path / "model.safetensors"))
        latents, captions = zoo.examples(family, 3)
        others, (empty, *_) = zoo.examples(family, 3, seed=7)
    given = sara.examples.Examples(latents, with_references(captions, others), empty)
    plain = sara.examples.Examples(latents, captions, empty)
    with sara.host.trainable(patcher, torch.float32) as calls, torch.no_grad():
        data, without = (sara.sets.TrainingSet(calls, examples) for examples in (given, plain))
        clean, sigma = data.latents([0, 1, 2]), torch.tensor([0.3, 0.6, 0.9])
        numbers = [0, 0, None]
        together = data.predict(clean, sigma, [0, 1, 2], numbers)
        for i, number in enumerate(numbers):
            text, options = (captions[i], empty)[number is None]
            call = {
                "c_crossattn": text.clone().float(),
                "y": options["pooled_output"].clone().float()
                if "pooled_output" in options
                else None,
                "ref_latents": [patcher.model.process_latent_in(others[i].clone().float())],
            }
            if family == "Flux dev":
                call["guidance"] = torch.tensor([3.5])
            call = {name: value for name, value in call.items() if value is not None}
            alone = calls.model.apply_model(
                clean[i : i + 1], sigma[i : i + 1], transformer_options={}, **call
            )
            torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-3, atol=1e-3)
        change = without.predict(clean, sigma, [0, 1, 2], numbers) - together
        assert (change.flatten(1).norm(dim=1) > 1e-4 * together.flatten(1).norm(dim=1)).all()


def test_a_run_with_other_references_is_not_gone_on_with(sara):
    latents, captions = pairs(2)
    one, two = (
        sara.examples.describe_examples(
            sara.examples.Examples(latents, with_references(captions, pairs(2, seed=seed)[0]))
        )
        for seed in (1, 2)
    )
    assert one != two
    plain = sara.examples.describe_examples(sara.examples.Examples(latents, captions))
    facts = {"model": 0, "held out": 0, "sampling": 0, "patches": ""}
    told = sara.examples.differences
    (line,) = told(facts | one, facts | two)
    assert "other reference latents or masks are given" in line
    assert told(facts | plain, facts | one) == [line]
    before = {
        key: value for key, value in one.items() if key != "given"
    }  # as runs of before have it
    assert told(facts | before, facts | one) == []


def test_references_of_one_area_but_other_shapes_are_passed_apart(sara, tmp_path):
    import comfy.sd

    zoo.write("Qwen-Image", tmp_path / "model.safetensors")
    with torch.inference_mode():
        patcher = comfy.sd.load_diffusion_model(str(tmp_path / "model.safetensors"))
        latents, captions = zoo.examples("Qwen-Image", 2)
        shape = list(latents[0].shape)
        wide, tall = torch.randn(*shape[:-2], 4, 16), torch.randn(*shape[:-2], 16, 4)
    examples = sara.examples.Examples(latents, with_references(captions, [wide, tall]))
    with sara.host.trainable(patcher, torch.float32) as calls, torch.no_grad():
        data = sara.sets.TrainingSet(calls, examples)
        assert (
            data.predict(data.latents([0, 1]), torch.tensor([0.3, 0.6]), [0, 1], [0, 0])
            .isfinite()
            .all()
        )


def test_what_is_of_the_text_alone_does_not_reach_the_empty_caption(sara):
    """As Hunyuan's encoders give captions with quoted text the look of its letters."""
    reference, letters = torch.ones(1, 4), torch.zeros(1, 3)
    empty = [torch.zeros(1, 2), {"pooled_output": torch.zeros(1)}]
    given = {"conditioning_byt5small": letters, "attention_mask": letters, "guidance": 2.0, "reference_latents": [reference]}  # fmt: skip
    text, options = sara.examples.with_options(empty, given)
    assert text is empty[0]
    assert options.keys() == {"pooled_output", "guidance", "reference_latents"}
    of_text = {"conditioning_byt5small": letters}
    assert sara.examples.with_options(empty, of_text) is empty


def test_pictures_of_one_name_but_two_endings_are_told_apart(server):
    make(server, "twins", **{"a.png": noise(64, 64, 460), "a.bmp": noise(64, 64, 461)})
    graph = Graph(server)
    checkpoint, _, _ = emoji64(graph)
    data = folder_node(graph, checkpoint, "input/twins")
    keep(graph, data, "twins")
    encoded(graph, checkpoint, references(graph, data, "input/twins"), "of_twins")
    graph.run()
    for latent, reference in zip(saved(server, "twins"), saved(server, "of_twins"), strict=True):
        torch.testing.assert_close(latent, reference, rtol=0, atol=1e-4)
    make(server, "one_of_twins", **{"a.webp": noise(64, 64, 462)})
    graph = Graph(server)
    checkpoint, _, _ = emoji64(graph)
    data = folder_node(graph, checkpoint, "input/one_of_twins")
    graph("PreviewImage", images=references(graph, data, "input/twins"))
    with pytest.raises(PromptError, match="a.webp may belong to a.bmp or a.png in twins"):
        graph.run()


@pytest.fixture
def inpainting(sd15, tmp_path):
    """SD1.5 with the nine input channels of its inpainting model."""
    import comfy.sd

    state = load_file(tmp_path / "mini.safetensors")
    first = "input_blocks.0.0.weight"
    more = torch.randn(320, 5, 3, 3, generator=torch.Generator().manual_seed(1)) * 0.02
    state[first] = torch.cat([state[first], more], 1)
    save_file(state, tmp_path / "inpainting.safetensors")
    with torch.inference_mode():
        return comfy.sd.load_diffusion_model(str(tmp_path / "inpainting.safetensors"))


def masked(captions, latents, masks):
    return [
        [embedding, {**options, "concat_latent_image": latent, "concat_mask": mask}]
        for (embedding, options), latent, mask in zip(captions, latents, masks, strict=True)
    ]


def test_an_inpainting_model_is_given_the_mask_and_what_is_left(inpainting, sara, tmp_path):
    assert inpainting.model.concat_keys
    latents, captions = pairs(2)
    left, _ = pairs(2, seed=3)
    masks = [torch.zeros(1, 1, 64, 64), torch.ones(1, 1, 64, 64)]
    masks[0][..., :32] = 1
    examples = sara.examples.Examples(latents, masked(captions, left, masks))
    with sara.host.trainable(inpainting, None) as calls, torch.no_grad():
        data = sara.sets.TrainingSet(calls, examples)
        clean, sigma = data.latents([0, 1]), torch.tensor([0.5, 3.0])
        together = data.predict(clean, sigma, [0, 1], [0, 0])
        for i in range(2):
            small = torch.zeros(1, 1, 8, 8)
            small[..., : (4, 8)[i]] = 1
            rest = inpainting.model.process_latent_in(left[i].clone())
            alone = calls.model.apply_model(
                clean[i : i + 1], sigma[i : i + 1], c_crossattn=captions[i][0].clone(),
                c_concat=torch.cat([small, rest], 1), transformer_options={},
            )  # fmt: skip
            torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-4, atol=1e-4)
    options = settings(sara, steps=2, batch_size=2)
    paths = []
    for name in ("one", "two"):
        folder = sara.folder.RunFolder.create(tmp_path / name, "run", options)
        paths.append(sara.run.run(inpainting, examples, folder, None)[0])
    equal(*(sara.core.SparseDelta.load(path) for path in paths))
    plain, _, _ = run(sara, inpainting, tmp_path / "plain", options)
    assert sara.core.SparseDelta.load(plain).num_values > 0  # as ComfyUI samples it without a mask


def test_features_made_in_inference_mode_can_be_trained_with(sara):
    """As Wan's picture-to-video models are given a first frame's CLIP features, within an object."""
    import comfy.conds

    with torch.inference_mode():
        features = torch.randn(1, 4, 8)
    from sara_pack.nodes.host import model_calls

    cond = model_calls._trackable(comfy.conds.CONDRegular(features))
    assert not cond.cond.is_inference()
    assert torch.equal(cond.cond, features)


def test_lists_go_through_comfyuis_nodes_to_the_training(server):
    make(server, "pairs_to", **{f"{i}.png": noise(64, 64, 430 + i) for i in range(3)})
    folder = make(server, "pairs_from", **{f"{i}.jpg": noise(64, 64, 440 + i) for i in range(3)})
    for i in range(3):
        (folder.parent / "pairs_to" / f"{i}.txt").write_text(f"edit {i}")
    graph = Graph(server)
    checkpoint, model, _ = emoji64(graph)
    data = folder_node(graph, checkpoint, "input/pairs_to", repeats=2)
    text = graph("CLIPTextEncode", clip=checkpoint.out(1), text=data.out(6))
    latent = encoded(graph, checkpoint, references(graph, data, "input/pairs_from"), "pairs_from")
    positive = graph("ReferenceLatent", conditioning=text, latent=latent)
    train = graph(
        "SaraTrain", model=model, latents=data, positive=positive, empty=data.out(3), steps=1,
        batch_size=6, output_name="edit",
    )  # fmt: skip
    assert "saved edit_00001" in graph.run()[train]["text"][0]
    assert len(saved(server, "pairs_from")) == 6
