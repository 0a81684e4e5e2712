"""Inputs from which nothing, or something else than shown, would be learned."""

import math

import pytest
import torch
from PIL import Image

from ..harness.server import PromptError
from .builders import pairs, settings, train
from .graphs import Graph, emoji64


def gathered(sara, latents, captions, masks=None, **more):
    from sara_pack.nodes.training.unlearnable import refuse_unlearnable

    given = [{"samples": latent, **more} for latent in latents]
    examples = sara.examples.gather_examples(
        given, [[pair] for pair in captions], None, masks, None, None
    )
    refuse_unlearnable(examples)
    return examples


def test_sound_inputs_are_taken(sara):
    latents, captions = pairs(3)
    masks = [torch.zeros(1, 64, 64) for _ in latents]
    masks[1][:, 5, 5] = 1
    examples = gathered(sara, latents, captions, masks)
    assert examples.labels == ["picture 1", "picture 2", "picture 3"]


@pytest.mark.parametrize(
    ("break_", "message"),
    [
        (lambda z, c: z[1].fill_(math.nan), "the latents of picture 2 hold NaN or infinity"),
        (lambda z, c: z[0][..., 3].fill_(math.inf), "the latents of picture 1 hold NaN"),
        (lambda z, c: [one.zero_() for one in z], "of picture 1, picture 2, picture 3 are empty"),
        (lambda z, c: c[2][0].fill_(math.nan), "the captions of picture 3 hold NaN"),
    ],
)
def test_latents_and_captions_that_teach_nothing_are_refused(sara, break_, message):
    latents, captions = pairs(3)
    with torch.inference_mode():
        break_(latents, captions)
    with pytest.raises(ValueError, match=message):
        gathered(sara, latents, captions)


def test_a_picture_is_named_by_its_file(sara):
    latents, captions = pairs(1)
    with torch.inference_mode():
        latents[0].fill_(math.nan)
    with pytest.raises(ValueError, match=r"the latents of sub/cat\.png hold NaN"):
        gathered(sara, latents, captions, sara_name="sub/cat.png")


def test_masks_that_keep_nothing_are_refused_or_named(sd15, sara):
    from sara_pack.nodes.training.advice import likely_mistakes

    latents, captions = pairs(3)
    black = torch.zeros(1, 64, 64)
    with pytest.raises(ValueError, match="the masks keep nothing of any picture.*Load Image gives"):
        gathered(sara, latents, captions, [black])
    masks = [black, torch.ones(1, 64, 64), black]
    examples = gathered(sara, latents, captions, masks)
    said = likely_mistakes(sd15, settings(sara, caption_dropout=0.0), examples, 4)
    assert "the masks keep nothing of picture 1, picture 3, so nothing is learned of them" in said


def test_the_noise_mask_of_a_latent_counts_as_its_mask(sara):
    latents, captions = pairs(2)
    half = torch.zeros(1, 1, 16, 16)
    half[..., :8] = 1
    examples = gathered(sara, latents, captions, noise_mask=half)
    assert [mask.shape for mask in examples.masks] == [(1, 16, 16)] * 2
    assert all(torch.equal(mask, half[0]) for mask in examples.masks)
    white = torch.ones(1, 4, 4)  # one that is connected comes first
    assert gathered(sara, latents, captions, [white], noise_mask=half).masks[0] is not None
    assert gathered(sara, latents, captions, [white], noise_mask=half).masks[0].all()


def test_a_loss_of_exactly_zero_is_said(sd15, sara, tmp_path):
    latents, captions = pairs(2)
    masks = [torch.zeros(1, 8, 8)] * 2
    options = settings(sara, caption_dropout=0.0)
    folder = sara.folder.RunFolder.create(tmp_path, "run", options)
    given = sara.examples.Examples(latents, captions, masks=masks)
    _, losses, chart = sara.run.run(sd15, given, folder, None)
    assert losses["loss"] == [0.0] * 4
    (line,) = [line for line in chart["warnings"] if "exactly 0" in line]
    assert line.startswith("step 1: ")


def test_frames_are_added_or_taken_away_where_nothing_is_lost(sd15, emoji64, sara, monkeypatch):
    calls = sara.host.ModelCalls(sd15)
    picture = torch.randn(1, 4, 6, 8)
    assert torch.equal(calls.prepare_latent(picture[:, :, None]), calls.prepare_latent(picture))
    with pytest.raises(ValueError, match=r"\(1, 4, 5, 6, 8\) but this SD15 model takes pictures"):
        calls.prepare_latent(torch.randn(1, 4, 5, 6, 8))
    with pytest.raises(ValueError, match="16 channels but this SD15 model takes 4"):
        calls.prepare_latent(torch.randn(1, 16, 6, 8))
    monkeypatch.setattr(type(sd15.model.latent_format), "latent_dimensions", 3)
    assert calls.prepare_latent(picture).shape == (1, 4, 1, 6, 8)
    assert calls.prepare_latent(torch.randn(1, 4, 5, 6, 8)).shape == (1, 4, 5, 6, 8)
    with pytest.raises(ValueError, match=r"\(1, 4, 6\) but this SD15 model takes videos"):
        calls.prepare_latent(torch.randn(1, 4, 6))


@pytest.mark.parametrize(
    ("name", "channels", "is_video"),
    [
        ("SD3", 16, False), ("Flux", 16, False), ("Wan21", 16, True), ("Wan22", 48, True),
        ("Mochi", 12, True), ("HunyuanVideo", 16, True), ("LTXV", 128, True),
    ],
)  # fmt: skip
def test_a_picture_becomes_one_frame_where_the_family_takes_videos(
    sd15, sara, monkeypatch, name, channels, is_video
):
    import comfy.latent_formats

    monkeypatch.setattr(sd15.model, "latent_format", getattr(comfy.latent_formats, name)())
    calls = sara.host.ModelCalls(sd15)
    picture = torch.randn(1, channels, 6, 8)
    frames = (1, channels, 1, 6, 8)
    assert calls.prepare_latent(picture).shape == (frames if is_video else picture.shape)
    assert torch.equal(calls.prepare_latent(picture.view(frames)), calls.prepare_latent(picture))
    with pytest.raises(ValueError, match=f"4 channels but this SD15 model takes {channels}"):
        calls.prepare_latent(torch.randn(1, 4, 6, 8))


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"start_percent": 0.0, "end_percent": 0.5}, "end_percent"),
        ({"start_percent": 0.2, "end_percent": 1.0}, "start_percent"),
        ({"strength": 0.5}, "strength"),
    ],
)
def test_conditioning_for_some_steps_or_in_part_is_refused(sd15, sara, options, name):
    latents, captions = pairs(2)
    captions[1][1].update(options)
    with pytest.raises(ValueError, match=f"carries {name}, which SaRA Train cannot use"):
        train(sara, sd15, latents, captions, settings(sara))
    captions[1][1].update({"start_percent": 0.0, "end_percent": 1.0, "strength": 1.0})
    train(sara, sd15, latents, captions, settings(sara, steps=1))


def test_a_run_none_of_whose_steps_counted_is_no_success(sd15, sara, tmp_path):
    latents, captions = pairs(2)
    hook = sd15.model.diffusion_model.register_forward_hook(lambda m, i, o: o * math.nan)
    folder = sara.folder.RunFolder.create(tmp_path, "run", settings(sara, steps=3))
    with pytest.raises(FloatingPointError, match="not finite in any step, so nothing was learned"):
        sara.run.run(sd15, sara.examples.Examples(latents, captions), folder, None)
    hook.remove()
    assert not sara.folders.is_finished(sara.folder.RunFolder(folder.path))


def test_the_loss_map_holds_finite_numbers_only(sara):
    losses = [math.nan, 2.0, math.inf, 1.0]
    found = sara.folders.loss_map(losses, [(1, 0.5), (2, math.nan)])
    assert found == {
        "loss": [2.0, 2.0, 2.0, 1.0], "validation_step": [1], "validation_loss": [0.5],
    }  # fmt: skip


def test_a_run_that_got_worse_says_so(sd15, sara, tmp_path):
    from sara_pack.nodes.training.ending import worse_than_it_began

    assert worse_than_it_began([1.0, 30.0]) is None  # too few to say
    assert worse_than_it_began([1.0] * 10 + [9.0] * 10) is None  # noise
    assert worse_than_it_began([1.0] * 100) is None
    assert "rose from 1 to 11" in worse_than_it_began([1.0] * 10 + [11.0] * 10)
    assert "rose from 1 to 2.5" in worse_than_it_began([1.0] * 60 + [2.5] * 60)
    latents, captions = pairs(4)
    options = settings(sara, steps=12, learning_rate=1.0, progressive=0.0)
    folder = sara.folder.RunFolder.create(tmp_path, "run", options)
    _, losses, chart = sara.run.run(sd15, sara.examples.Examples(latents, captions), folder, None)
    assert "the model got worse instead of learning" in chart["warnings"][-1]


def test_the_black_mask_of_load_image_is_refused_through_the_executor(server):
    Image.new("RGB", (64, 64), "red").save(server.base / "input" / "red.png")
    graph = Graph(server)
    checkpoint, model, empty = emoji64(graph)
    picture = graph("LoadImage", image="red.png")
    latent = graph("VAEEncode", pixels=picture, vae=checkpoint.out(2))
    graph(
        "SaraTrain", model=model, latents=latent, positive=empty, masks=picture.out(1), steps=2,
        output_name="black",
    )  # fmt: skip
    with pytest.raises(PromptError, match="the masks keep nothing of any picture"):
        graph.run()
    assert not list((server.base / "output" / "sara").glob("black*"))
