"""What a folder becomes, encoded by a stand-in whose values are known."""

import numpy as np
import pytest
import torch
from PIL import Image
from sara_pack.sara_core.pictures.encoding_cache import EncodingCache

from ..harness.environment import checkpoint


def noise(width, height, seed=0):
    data = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(data)


@pytest.fixture
def encoding(monkeypatch):
    """The pipeline with an 'encoder' that averages eight pixels to one."""
    from sara_pack.nodes import host
    from sara_pack.nodes.pictures import encoded_folder, folder_plan
    from sara_pack.sara_core.pictures.buckets import SizeRule

    def encode(vae, pixels):
        encode.calls.append(pixels)
        return torch.nn.functional.avg_pool2d(pixels.movedim(-1, 1), 8)

    encode.calls = []
    monkeypatch.setattr(host, "vae_facts", lambda vae: ["average"])
    monkeypatch.setattr(host, "clip_facts", lambda clip: ["none"])
    monkeypatch.setattr(host, "encode_pixels", encode)
    monkeypatch.setattr(
        host, "encode_text", lambda clip, text, emphasis=False: [[torch.tensor([len(text)]), {}]]
    )

    def run(folder, cache, **options):
        rule = SizeRule(options.pop("side", 64))
        chosen = folder_plan.FolderOptions(rule, **options)
        return encoded_folder.encode_folder(folder, None, None, chosen, cache, None)

    run.encode, run.module = encode, encoded_folder
    return run


def test_a_file_that_changes_while_it_is_read_does_not_poison_the_cache(encoding, tmp_path):
    folder = tmp_path / "f"
    folder.mkdir()
    for name, shade in (("a", 40), ("b", 0)):
        Image.new("RGB", (64, 64), (shade,) * 3).save(folder / f"{name}.png")
    cache = EncodingCache(tmp_path / "cache", 1 << 30)
    whole = (folder / "b.png").read_bytes()
    encode = encoding.encode

    def change(vae, pixels):
        Image.new("RGB", (80, 64), "white").save(folder / "b.png")
        return encode(vae, pixels)

    encoding.module.host.encode_pixels = change
    found = encoding(folder, cache)
    assert [v.file.name for v in found.variants] == ["a.png"]
    assert "b.png: it has changed while the folder was read" in str(found.problems[0])
    encoding.module.host.encode_pixels = encode
    (folder / "b.png").write_bytes(whole)
    found = encoding(folder, cache)
    assert found.read == 1
    latents = [found.encodings[v.key]["latent"] for v in found.variants]
    assert [round(t.mean().item() * 255) for t in latents] == [40, 0]


def test_windows_flips_masks_and_crops_by_value(encoding, tmp_path):
    data = np.zeros((64, 128, 4), np.uint8)
    data[:, :64], data[:, 64:] = (255, 0, 0, 255), (0, 0, 255, 0)
    Image.fromarray(data).save(tmp_path / "p.png")
    off = EncodingCache(tmp_path, 0)
    found = encoding(tmp_path, off, crops=3, flip=True, background="black")
    (sizes,) = {v.size for v in found.variants}
    assert sizes == (80, 48)
    assert len(found.variants) == 6
    for plain, mirrored in zip(found.variants[::2], found.variants[1::2], strict=True):
        one, two = found.encodings[plain.key], found.encodings[mirrored.key]
        assert torch.allclose(one["latent"].flip(-1), two["latent"], atol=1e-3)
        assert torch.allclose(one["mask"].flip(-1), two["mask"], atol=1e-3)
    left, middle, right = (found.encodings[v.key] for v in found.variants[::2])
    assert left["mask"].mean() > middle["mask"].mean() > right["mask"].mean()
    for entry in (left, middle, right):
        red, _, blue = entry["latent"]
        assert torch.allclose(red, entry["mask"], atol=0.02)  # transparent is black
        assert blue.abs().max() < 0.02


def test_captions_with_embeddings_are_encoded_every_time(encoding, tmp_path):
    Image.new("RGB", (64, 64)).save(tmp_path / "p.png")
    texts = []
    encoding.module.host.encode_text = lambda clip, text, emphasis=False: (
        texts.append(text) or [[None, {}]]
    )
    cache = EncodingCache(tmp_path / "cache", 1 << 30)
    for _ in range(2):
        encoding(tmp_path, cache, default_caption="by embedding:mine")
    assert texts == ["", "by embedding:mine", "by embedding:mine"]


def test_a_picture_of_which_the_vae_makes_nan_is_named_and_not_kept(encoding, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    for number in range(3):
        noise(64, 64, number).save(folder / f"{number}.png")
    cache = EncodingCache(tmp_path / "cache", 1 << 30)
    encode, count = encoding.module.host.encode_pixels, []

    def fail_second(vae, pixels):
        count.append(0)
        return encode(vae, pixels) * (float("nan") if len(count) == 2 else 1)

    encoding.module.host.encode_pixels = fail_second
    found = encoding(folder, cache)
    assert [v.file.name for v in found.variants] == ["0.png", "2.png"]
    (problem,) = found.problems
    assert str(problem).startswith("1.png: the VAE makes NaN or infinity of it; start ComfyUI with")
    found = encoding(folder, cache)  # the VAE works now, and nothing broken is in the cache
    assert len(found.variants) == 3
    assert found.read == 2
    assert not found.problems
    count.clear()
    with pytest.raises(ValueError, match=r"files that are not used:\n  .*\.png: the VAE makes NaN"):
        encoding(folder, cache.off(), refuse=True)


def test_a_size_far_above_the_pictures_says_which_would_do(encoding, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    for number in range(12):
        noise(64, 64, number).save(folder / f"{number}.png")
    with pytest.raises(ValueError, match="too small") as caught:
        encoding(folder, EncodingCache(tmp_path / "cache", 0), side=1024)
    lines = str(caught.value).splitlines()
    assert len(lines) == 2
    assert "0.png: and 11 more of 12 pictures are too small for a size of 1024" in lines[1]
    assert "a size of 64 would suit most of them" in lines[1]
    assert len(encoding(folder, EncodingCache(tmp_path / "cache", 0), side=64).variants) == 12


def test_parentheses_in_captions_are_text_or_emphasis(sara):
    import comfy.sd

    with torch.inference_mode():
        clip = comfy.sd.load_checkpoint_guess_config(str(checkpoint()), output_model=False)[1]

    def plainly(text):
        return clip.encode_from_tokens_scheduled(clip.tokenize(text))[0][0]

    encode = sara.host.encode_text
    with torch.inference_mode():
        assert torch.equal(encode(clip, "saber (fate)")[0][0], plainly(r"saber \(fate\)"))
        assert torch.equal(encode(clip, "saber (fate)", True)[0][0], plainly("saber (fate)"))
        assert not torch.equal(encode(clip, "saber (fate)")[0][0], plainly("saber (fate)"))
        assert torch.equal(encode(clip, "a cat")[0][0], plainly("a cat"))


def test_a_process_is_cancelled_where_another_one_was(encoding, tmp_path, monkeypatch):
    from sara_pack.nodes import host
    from sara_pack.sara_core.training.processes import OtherProcessFailed

    folder = tmp_path / "f"
    folder.mkdir()
    noise(64, 64).save(folder / "a.png")
    cache = EncodingCache(tmp_path / "cache", 1 << 30)
    for text, kind in (("InterruptProcessingException: ", host.Cancelled),
                       ("OSError: the disk is gone", OtherProcessFailed)):  # fmt: skip

        def divide(*_, text=text):
            raise OtherProcessFailed([None, text])

        monkeypatch.setattr(encoding.module, "divide", divide)
        with pytest.raises(kind):
            encoding(folder, cache)
