"""What a folder becomes, encoded by a stand-in whose values are known."""

import numpy as np
import pytest
import torch
from PIL import Image


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
    monkeypatch.setattr(host, "encode_text", lambda clip, text: [[torch.tensor([len(text)]), {}]])

    def run(folder, cache, **options):
        rule = SizeRule(options.pop("side", 64))
        chosen = folder_plan.FolderOptions(rule, **options)
        return encoded_folder.encode_folder(folder, None, None, chosen, cache, None)

    run.encode, run.module = encode, encoded_folder
    return run


def test_a_file_that_changes_while_it_is_read_does_not_poison_the_cache(encoding, tmp_path):
    from sara_pack.sara_core.pictures.encoding_cache import EncodingCache

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
    from sara_pack.sara_core.pictures.encoding_cache import EncodingCache

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
    from sara_pack.sara_core.pictures.encoding_cache import EncodingCache

    Image.new("RGB", (64, 64)).save(tmp_path / "p.png")
    texts = []
    encoding.module.host.encode_text = lambda clip, text: texts.append(text) or [[None, {}]]
    cache = EncodingCache(tmp_path / "cache", 1 << 30)
    for _ in range(2):
        encoding(tmp_path, cache, default_caption="by embedding:mine")
    assert texts == ["", "by embedding:mine", "by embedding:mine"]
