"""SaRA Video Folder: which frames are taken, how they look, and a training on clips and pictures together."""

import types
from fractions import Fraction

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from . import zoo
from .builders import settings
from .graphs import Graph, emoji64
from .models import wan_vae_weights

SHADES = 12  # frame i is of the grey 20 i


def write_video(path, count=SHADES, rate=8, size=(64, 48), wide=None, b_frames=0):
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1" if path.suffix == ".mkv" else "mpeg4", rate=rate)
        stream.codec_context.max_b_frames = b_frames
        if wide:
            stream.codec_context.sample_aspect_ratio = wide
        stream.width, stream.height = size
        stream.pix_fmt = "bgr0" if path.suffix == ".mkv" else "yuv420p"
        stream.time_base = Fraction(1, rate)
        for i in range(count):
            pixels = np.full((size[1], size[0], 3), 20 * i % 256, dtype=np.uint8)
            pixels[:8, :, 0] = 255  # red on top
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts = i
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def shades(images):
    return {
        number: round(np.asarray(image)[-1, -1].mean() / 20) for number, image in images.items()
    }


@pytest.fixture
def videos(sara):
    from sara_pack.nodes.pictures import clips, video_files

    return clips, video_files


def options(module, **changes):
    from sara_pack.sara_core.pictures.buckets import SizeRule

    return module.ClipOptions(SizeRule(64), **changes)


def test_frames_are_those_asked_for_upright_and_in_order(videos, tmp_path):
    _, video_files = videos
    path = write_video(tmp_path / "a.mkv")
    facts = video_files.video_facts(path)
    assert (facts.size, facts.count) == ((64, 48), SHADES)
    assert facts.times == pytest.approx([i / 8 for i in range(SHADES)], abs=1e-3)
    for wanted in ([0], [11], [3, 5, 4], range(SHADES)):
        found = dict(video_files.video_frames(path, list(wanted), "white"))
        assert shades(found) == {number: number for number in wanted}
    top = np.asarray(dict(video_files.video_frames(path, [2], "white"))[2])[0, 0]
    assert tuple(top) == (255, 40, 40)


def test_a_compressed_file_and_a_folder_of_frames_hold_the_same(videos, tmp_path):
    _, video_files = videos
    path = write_video(tmp_path / "a.mp4")
    frames = tmp_path / "frames"
    frames.mkdir()
    lossless = dict(
        video_files.video_frames(write_video(tmp_path / "b.mkv"), range(SHADES), "white")
    )
    for number, image in lossless.items():
        image.save(frames / f"{number}.png")
    assert video_files.video_facts(frames).at_rate(8).times == pytest.approx(
        video_files.video_facts(path).times, abs=1e-3
    )
    assert shades(dict(video_files.video_frames(path, [1, 6, 11], "white"))) == {1: 1, 6: 6, 11: 11}
    found = dict(video_files.video_frames(frames, [11, 1], "white"))
    assert all(np.array_equal(found[n], lossless[n]) for n in (1, 11))
    before = video_files.video_digest(frames)
    Image.new("RGB", (64, 48)).save(frames / "3.png")
    assert video_files.video_digest(frames) != before


@pytest.mark.parametrize(("rotation", "corner"), [(0, 0), (-90, 1), (180, 3), (90, 2)])
def test_a_phones_frames_come_as_they_were_held(videos, rotation, corner):
    """PyAV tells by how much a frame is to be turned counterclockwise to be seen."""
    _, video_files = videos

    class Frame:
        def to_ndarray(self, format):
            return np.array(
                [[[1] * 3, [2] * 3, [3] * 3], [[4] * 3, [5] * 3, [6] * 3]], dtype=np.uint8
            )

    Frame.rotation = rotation
    found = np.asarray(
        video_files._upright(Frame(), types.SimpleNamespace(sample_aspect_ratio=None))
    )
    found = found[..., 0]
    corners = [found[0, 0], found[0, -1], found[-1, 0], found[-1, -1]]
    assert corners.index(1) == corner  # of what was at the top left
    assert found.shape == ((2, 3) if rotation in (0, 180) else (3, 2))


@pytest.mark.parametrize("b_frames", [0, 2])
@pytest.mark.parametrize("ending", ["avi", "mpg", "mp4", "mov"])
def test_frames_are_counted_alike_in_formats_that_cannot_be_sought_in(
    videos, tmp_path, ending, b_frames
):
    _, video_files = videos
    path = write_video(tmp_path / f"a.{ending}", rate=25, b_frames=b_frames)
    facts = video_files.video_facts(path)
    assert facts.count == SHADES
    assert facts.times == pytest.approx([i / 25 for i in range(SHADES)], abs=2e-3)
    found = shades(dict(video_files.video_frames(path, range(SHADES), "white")))
    assert found == {number: number for number in range(SHADES)}


def test_times_that_the_file_rounds_leave_no_frame_out(videos, tmp_path):
    """Matroska counts in milliseconds, so frames at 30 a second come up to half of one late."""
    clips, video_files = videos
    times = video_files.video_facts(write_video(tmp_path / "a.mkv", count=70, rate=30)).times
    for fps in (0.0, 30.0):
        (frames,) = clips.frames_of(times, options(clips, frames=(65,), fps=fps))
        assert frames == tuple(range(frames[0], frames[0] + 65))


def test_old_formats_come_as_wide_as_they_are_seen(videos, tmp_path):
    _, video_files = videos
    path = write_video(tmp_path / "a.mpg", rate=25, size=(64, 48), wide=Fraction(4, 3))
    assert video_files.video_facts(path).size == (85, 48)
    ((_, frame),) = video_files.video_frames(path, [5], "white")
    assert frame.size == (85, 48)


def test_a_file_that_names_others_is_not_opened(videos, tmp_path):
    _, video_files = videos
    write_video(tmp_path / "secret.mkv")
    (tmp_path / "a.mp4").write_text("ffconcat version 1.0\nfile secret.mkv\n")
    with pytest.raises(ValueError, match="it is not a video that can be read"):
        video_files.video_facts(tmp_path / "a.mp4")


def test_what_cannot_be_read_is_explained(videos, tmp_path):
    _, video_files = videos
    (tmp_path / "a.mp4").write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match="it is not a video that can be read"):
        video_files.video_facts(tmp_path / "a.mp4")
    whole = write_video(tmp_path / "b.mkv").read_bytes()
    (tmp_path / "c.mkv").write_bytes(whole[:200])
    with pytest.raises(ValueError, match="no frame that can be decoded|damaged|can be read"):
        video_files.video_facts(tmp_path / "c.mkv")


def test_clips_are_chosen_by_time(videos):
    clips, _ = videos
    at8 = [i / 8 for i in range(12)]
    for changes, expected in (
        ({"frames": (5,)}, [(3, 4, 5, 6, 7)]),  # the middle, every frame
        ({"frames": (5,), "fps": 4.0}, [(0, 2, 4, 6, 8)]),
        ({"frames": (5,), "fps": 16.0}, [(4, 5, 5, 6, 6)]),
        ({"frames": (5,), "clips": 2}, [(0, 1, 2, 3, 4), (7, 8, 9, 10, 11)]),
        ({"frames": (33, 17, 9, 5)}, [(1, 2, 3, 4, 5, 6, 7, 8, 9)]),  # the longest that fits
        ({"frames": (12,), "clips": 3}, [tuple(range(12))]),
        ({"frames": (13,)}, []),
    ):
        assert clips.frames_of(at8, options(clips, **changes)) == expected, changes
    uneven = [0.0, 0.1, 0.9, 1.0]
    assert clips.frames_of(uneven, options(clips, frames=(3,), fps=2.0)) == [(0, 1, 3)]


@pytest.fixture
def wan_vae():
    import comfy.sd

    with torch.inference_mode():
        return comfy.sd.VAE(sd=wan_vae_weights())


class Text:
    """Stands for a text encoder of Wan's width; only what it is asked for."""

    class patcher:  # noqa: N801
        patches, forced_hooks = {"none": "kept on disk"}, None

    def tokenize(self, text, **_):
        return text

    def encode_from_tokens_scheduled(self, text):
        generator = torch.Generator().manual_seed(sum(text.encode()))
        return [[torch.randn(1, 20, 4096, generator=generator), {}]]


def encoded(sara, folder, vae, cache, **widgets):
    from sara_pack.nodes.pictures import encoded_folder, video_folder
    from sara_pack.nodes.pictures.clips import VIDEOS, ClipOptions, lengths
    from sara_pack.nodes.pictures.folder_inputs import folder_options

    given = {entry.id: entry.default for entry in video_folder.video_inputs() if entry.default is not None}  # fmt: skip
    given |= {"size": 64, **widgets}
    frames, fps, clips = (given.pop(name) for name in ("frames", "fps", "clips"))
    plain, _ = folder_options(16, None, **video_folder.PLAIN, **given)
    chosen = ClipOptions(**vars(plain), frames=lengths(vae, frames), fps=fps, clips=clips)
    with torch.inference_mode():
        return encoded_folder.encode_folder(folder, vae, Text(), chosen, cache, None, VIDEOS)


def test_clips_are_encoded_as_the_vae_encodes_their_frames_and_train(
    sara, wan_vae, tmp_path, monkeypatch
):
    import comfy.sd
    from sara_pack.sara_core.pictures.encoding_cache import EncodingCache

    monkeypatch.setattr(sara.host, "check_cancelled", lambda: None)
    folder = tmp_path / "videos"
    folder.mkdir()
    paths = [
        write_video(folder / f"{name}.mkv", count)
        for name, count in (("a", 12), ("b", 6), ("c", 3))
    ]
    (folder / "a.txt").write_text("grey, slowly brighter")
    cache = EncodingCache(tmp_path / "cache", 1 << 30)
    found = encoded(sara, folder, wan_vae, cache, frames=10, fps=0.0, max_upscale=2.0)
    assert [(v.file.name, v.shape) for v in found.variants] == [
        ("a.mkv", (*found.variants[0].size, 9)),
        ("b.mkv", (*found.variants[0].size, 5)),
    ]
    assert "c.mkv: it is too short: 3 frames" in "".join(map(str, found.problems))
    from sara_pack.nodes.pictures.video_files import video_frames

    for path, variant in zip(paths, found.variants, strict=False):
        images = dict(video_frames(path, variant.frames, "white"))
        pixels = torch.stack([
            torch.from_numpy(np.array(images[n].resize(variant.size, Image.Resampling.LANCZOS, variant.window)))
            for n in variant.frames
        ]).float() / 255  # fmt: skip
        latent = found.encodings[variant.key]["latent"]
        assert tuple(latent.shape[:2]) == (16, (len(variant.frames) + 3) // 4)
        with torch.inference_mode():
            reference = wan_vae.encode(pixels)[0]
        torch.testing.assert_close(latent, reference, rtol=0, atol=1e-5)
        assert latent.std() > 0.01
    again = encoded(sara, folder, wan_vae, cache, frames=10, fps=0.0, max_upscale=2.0)
    assert again.read == 2
    faster = encoded(sara, folder, wan_vae, cache, frames=5, fps=4.0, max_upscale=2.0)
    assert [v.frames for v in faster.variants] == [(0, 2, 4, 6, 8)]

    zoo.write("Wan 2.1", tmp_path / "wan.safetensors")
    with torch.inference_mode():
        wan = comfy.sd.load_diffusion_model(str(tmp_path / "wan.safetensors"))
        still = wan_vae.encode(torch.rand(1, 64, 64, 3))
    latents = [{"samples": found.encodings[v.key]["latent"][None], "sara_picture": v.digest} for v in found.variants]  # fmt: skip
    captions = [found.captions[found.texts[v.file.name]] for v in found.variants]
    examples = sara.examples.gather_examples(
        [*latents, {"samples": still}],
        [*captions, captions[1]],
        [found.captions[""]],
        None,
        None,
        None,
    )
    run = sara.folder.RunFolder.create(tmp_path / "runs", "run", settings(sara, steps=4, batch_size=2, fraction=0.2))  # fmt: skip
    path, losses, _ = sara.run.run(wan, examples, run, None)
    assert len(losses["loss"]) == 4
    assert np.isfinite(losses["loss"]).all()
    assert sara.core.SparseDelta.load(path).num_values > 0


def test_a_vae_of_pictures_is_refused(sara):
    import comfy.sd

    from ..harness.environment import checkpoint

    with torch.inference_mode():
        vae = comfy.sd.load_checkpoint_guess_config(str(checkpoint()), output_model=False)[2]
    with pytest.raises(ValueError, match="encodes pictures, not videos"):
        sara.host.frames_taken(vae, 9)


def test_the_numbers_of_frames_are_those_a_vae_keeps_whole(sara, wan_vae):
    from sara_pack.nodes.pictures.clips import lengths

    assert sara.host.frames_taken(wan_vae, 36) == 33
    assert lengths(wan_vae, 33) == (33, 13, 5)
    assert lengths(wan_vae, 1) == (1,)
    with pytest.raises(
        ValueError, match="frames is 3, but this VAE encodes single pictures or at least 5"
    ):
        lengths(wan_vae, 3)


def test_videos_and_pictures_train_a_video_model_in_a_server(server):
    models, folder = server.base / "models", server.base / "input" / "films"
    for kind in ("vae", "diffusion_models"):
        (models / kind).mkdir(exist_ok=True)
    save_file(wan_vae_weights(), models / "vae" / "mini_wan.safetensors")
    zoo.write("Wan 2.1", models / "diffusion_models" / "mini_wan.safetensors")
    folder.mkdir()
    for name, count in (("a", 12), ("b", 9)):
        write_video(folder / f"{name}.mkv", count)
        (folder / f"{name}.txt").write_text(f"film {name}")
    listed = server.get("/object_info/SaraVideoFolder")["SaraVideoFolder"]["input"]["required"]
    assert "input/films" in listed["folder"][1]["options"]
    graph = Graph(server)
    checkpoint, _, _ = emoji64(graph)
    model = graph("UNETLoader", unet_name="mini_wan.safetensors", weight_dtype="default")
    vae = graph("VAELoader", vae_name="mini_wan.safetensors")
    clip = checkpoint.out(1)
    films = graph(
        "SaraVideoFolder", vae=vae, clip=clip, folder="input/films", frames=9, fps=0.0, clips=2,
        size=64, max_upscale=2.0,
    )  # fmt: skip
    stills = graph("SaraImageFolder", vae=vae, clip=clip, folder="input/fluent3d", size=64)
    both = graph(
        "SaraJoinPictures", latents=films, positive=films.out(1), latents_2=stills,
        positive_2=stills.out(1), repeats=5, repeats_2=1,
    )  # fmt: skip
    train = graph(
        "SaraTrain", model=model, latents=both, positive=both.out(1), empty=films.out(2), steps=1,
        epochs=1, batch_size=5, output_name="film", training_dtype="fp32",
    )  # fmt: skip
    outputs = graph.run()
    assert "input/films: 2 videos, 3 entries in an epoch" in outputs[films]["text"][0]
    assert "x9: 3 entries" in outputs[films]["text"][0]
    (chart,) = outputs[train]["sara_training"]
    assert chart["steps"] == 3 + 8  # 15 clips and 40 pictures, never in one batch
    assert chart["status"] == "finished"
