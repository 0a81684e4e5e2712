"""SaRA Image Folder through the real executor, and what SaRA Train makes of it."""

import csv
import io
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ..harness.environment import checkpoint
from ..harness.server import PromptError
from .graphs import Graph, cancel_at, emoji64


def folder_node(graph, checkpoint, folder, **options):
    return graph(
        "SaraImageFolder", vae=checkpoint.out(2), clip=checkpoint.out(1), folder=folder,
        **{"size": 64, **options},
    )  # fmt: skip


def keep(graph, node, name):
    """Save a node's latents, one file each."""
    graph("SaveLatent", samples=node, filename_prefix=f"latents/{name}")
    graph("PreviewImage", images=node.out(4))


def saved(server, name):
    paths = sorted((server.base / "output" / "latents").glob(f"{name}_*.latent"))
    return [load_file(path)["latent_tensor"] for path in paths]


def run_folder(server, folder, name=None, **options):
    graph = Graph(server)
    checkpoint, _, _ = emoji64(graph)
    node = folder_node(graph, checkpoint, folder, **options)
    keep(graph, node, name or folder.replace("/", "_"))
    return graph.run()[node], node


def make(server, name, **files):
    folder = server.base / "input" / name
    folder.mkdir(parents=True)
    for file, content in files.items():
        path = folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, Image.Image):
            content.save(path)
        else:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def noise(width, height, seed=0):
    data = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(data)


def test_the_shipped_pictures_are_encoded_as_the_vae_does(server):
    outputs, _ = run_folder(server, "input/fluent3d")
    report = outputs["text"][0]
    assert "input/fluent3d: 40 pictures, 40 entries in an epoch" in report
    assert "captions: 40 from .txt" in report
    assert "64x64: 40 entries" in report
    assert "40 at batch size 1, 20 at batch size 2, 10 at batch size 4, 5 at batch size 8" in report
    ours = saved(server, "input_fluent3d")
    assert [tuple(t.shape) for t in ours] == [(1, 16, 8, 8)] * 40
    assert outputs["images"]

    name = min(p.name for p in (server.base / "input" / "fluent3d").glob("*.png"))
    graph = Graph(server)
    checkpoint, _, _ = emoji64(graph)
    image = graph("LoadImage", image=f"fluent3d/{name}")
    first = graph("VAEEncode", pixels=image, vae=checkpoint.out(2))
    graph("SaveLatent", samples=first, filename_prefix="latents/core_first")
    graph.run()
    (core,) = saved(server, "core_first")
    assert torch.allclose(core, ours[0], atol=1e-5)  # 64 pixels a side: nothing is resized


def test_folders_of_the_datasets_type_are_listed_and_read(server):
    folder = server.base / "elsewhere" / "sets" / "mine" / "deep"
    folder.mkdir(parents=True)
    noise(64, 64, 500).save(folder / "a.png")
    (folder / "a.txt").write_text("noise")
    secret = server.base.parent / "secret_set"
    secret.mkdir()
    os.symlink(secret, folder.parents[1] / "link")
    listed = server.get("/object_info/SaraImageFolder")["SaraImageFolder"]["input"]["required"]
    names = listed["folder"][1]["options"]
    assert {"datasets/mine", "datasets/mine/deep"} <= set(names)
    assert "datasets/link" not in names
    outputs, _ = run_folder(server, "datasets/mine/deep")
    assert "datasets/mine/deep: 1 pictures, 1 entries" in outputs["text"][0]


def test_the_cache_gives_the_same_and_notices_every_change(server):
    folder = make(server, "cached", **{f"{i}.png": noise(64, 64, i) for i in range(4)})
    for i in range(4):
        (folder / f"{i}.txt").write_text(f"number {i}")
    first, _ = run_folder(server, "input/cached", "cached_a")
    assert "cache: 0 of 4 encodings were in it" in first["text"][0]
    again, _ = run_folder(server, "input/cached", "cached_b", trigger="sks")
    assert "cache: 4 of 4 encodings were in it" in again["text"][0]
    for one, two in zip(saved(server, "cached_a"), saved(server, "cached_b"), strict=True):
        assert torch.equal(one, two)
    noise(64, 64, 99).save(folder / "2.png")
    after, _ = run_folder(server, "input/cached", "cached_c")
    assert "cache: 3 of 4 encodings were in it" in after["text"][0]
    same = [torch.equal(a, b) for a, b in
            zip(saved(server, "cached_a"), saved(server, "cached_c"), strict=True)]  # fmt: skip
    assert same == [True, True, False, True]
    for path in (server.base / "user" / "sara_cache").iterdir():
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    mended, _ = run_folder(server, "input/cached", "cached_d", seed=1)
    assert "cache: 0 of 4 encodings were in it" in mended["text"][0]
    for one, two in zip(saved(server, "cached_c"), saved(server, "cached_d"), strict=True):
        assert torch.equal(one, two)
    off, _ = run_folder(server, "input/cached", "cached_e", cache_gb=0.0)
    assert "cache: 0 of 4 encodings were in it; it holds 0 files" in off["text"][0]


def test_a_changed_file_runs_the_node_again_and_nothing_else_does(server):
    folder = make(server, "watched", **{"a.png": noise(64, 64), "a.txt": "one"})
    graph = Graph(server)
    checkpoint, _, _ = emoji64(graph)
    node = folder_node(graph, checkpoint, "input/watched")
    keep(graph, node, "watched")

    def executed():
        prompt_id = server.submit(graph.prompt)
        server.wait(prompt_id)
        messages = dict(server.get(f"/history/{prompt_id}")[prompt_id]["status"]["messages"])
        return str(node) not in messages["execution_cached"]["nodes"]

    assert executed()
    assert not executed()
    (folder / ".DS_Store").write_text("no part of the set")
    os.utime(folder, (1e9, 1e9))  # a folder's own time changes with what is in it
    assert executed()
    (folder / ".DS_Store").write_text("and is not looked at")
    assert not executed()
    (folder / "notes.log").write_text("to be named in the report")
    assert executed()
    (folder / "a.txt").write_text("two")
    assert executed()
    assert not executed()
    (folder / "b.jpg").write_bytes((folder / "a.png").read_bytes())
    assert executed()


def test_phone_pictures_and_odd_files(server):
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    noise(400, 300, 1).save(buffer, "JPEG", exif=exif)
    cut = io.BytesIO()
    noise(200, 200, 2).save(cut, "PNG")
    clear = np.full((80, 80, 4), 255, np.uint8)
    clear[:, :40, 3] = 0
    make(
        server, "phone",
        **{
            "IMG_1.JPG": buffer.getvalue(), "cut.png": cut.getvalue()[:-500], "zero.webp": b"",
            "clear.png": Image.fromarray(clear), "small.bmp": noise(17, 18),
            "wide.tif": noise(320, 192, 3), "10_dog/d.png": noise(64, 64, 4),
            "metadata.jsonl": json.dumps({"file_name": "wide.tif", "text": "a wide one"}),
        },
    )  # fmt: skip
    outputs, _ = run_folder(
        server, "input/phone", trigger="sks", default_caption="something", flip=True, alpha="mask"
    )
    report = outputs["text"][0]
    assert "input/phone: 5 pictures, 28 entries in an epoch" in report
    assert "48x64: 2 entries" in report or "48x80: 2 entries" in report
    assert "cut.png: it is damaged or cut off" in report
    assert "zero.webp: it is empty" in report
    assert "1 from metadata.jsonl" in report
    assert "1 from folder name" in report
    assert "3 from none" in report
    shapes = {tuple(t.shape[-2:]) for t in saved(server, "input_phone")}
    assert (8, 8) in shapes
    assert any(h > w for h, w in shapes)
    assert any(w > h for h, w in shapes)

    with pytest.raises(PromptError, match=r"(?s)files that are not used.*zero\.webp") as error:
        run_folder(server, "input/phone", problems="refuse")
    assert "cut.png" in str(error.value)
    make(server, "nothing", **{"a.txt": "no picture"})
    with pytest.raises(PromptError, match="there is no folder 'input/nothing' with pictures"):
        run_folder(server, "input/nothing")
    with pytest.raises(PromptError, match="background 'blurple' is no colour"):
        run_folder(server, "input/phone", background="blurple")
    with pytest.raises(PromptError, match="divisible by 24, but this VAE needs"):
        run_folder(server, "input/phone", divisible_by=24)


@pytest.mark.parametrize(
    "name",
    ["input/..", "../secret", "/etc", "input/../../secret", "C:\\secret", "input/link",
     "input/fluent3d/../../../secret", "input/fluent3d\0", "fluent3d", ""],
)  # fmt: skip
def test_no_other_folder_can_be_named(server, name):
    secret = server.base.parent / "secret"
    if not secret.exists():
        secret.mkdir()
        noise(64, 64).save(secret / "a.png")
        os.symlink(secret, server.base / "input" / "link")
    listed = server.get("/object_info/SaraImageFolder")["SaraImageFolder"]["input"]["required"]
    assert name not in listed["folder"][1]["options"]
    with pytest.raises(PromptError, match="there is no folder"):
        run_folder(server, name, "hostile")


def test_training_on_a_folder_with_masks_regularisation_and_validation(server):
    folder = server.base / "input" / "part"
    folder.mkdir()
    for i, path in enumerate(sorted((server.base / "input" / "fluent3d").iterdir())[:16]):
        shutil.copy(path, folder)
        if path.suffix != ".txt" and i < 8:
            with Image.open(path) as image:
                half = image.convert("RGBA")
            half.putalpha(Image.linear_gradient("L").resize(half.size))
            half.save(folder / f"{path.stem}_half.png")
            (folder / f"{path.stem}_half.txt").write_text("half")
    graph = Graph(server)
    checkpoint, model, _ = emoji64(graph)
    data = folder_node(graph, checkpoint, "input/part", alpha="mask", flip=True)
    prior = folder_node(graph, checkpoint, "input/fluent3d")
    train = graph(
        "SaraTrain", model=model, latents=data, positive=data.out(1), masks=data.out(2),
        empty=data.out(3), regularisation_latents=prior, regularisation_positive=prior.out(1),
        regularisation_weight=0.5, validation_split=0.2, validate_every_steps=5, steps=12,
        batch_size=4, output_name="whole",
    )  # fmt: skip
    graph("LossGraphNode", loss=train.out(2))
    text = graph.run()[train]["text"][0]
    assert text.startswith("saved whole_00001/whole_12_steps.safetensors")
    run = server.base / "output" / "sara" / "whole_00001"
    rows = list(csv.DictReader((run / "loss.csv").open()))
    assert len(rows) == 12
    assert all(0 < float(r["regularisation_loss"]) < 10 for r in rows)
    validation = list(csv.DictReader((run / "validation.csv").open()))
    assert [int(r["step"]) for r in validation] == [0, 5, 10, 12]
    assert len({r["loss"] for r in validation}) == 4
    assert all(0 < float(r["loss"]) < 10 for r in validation)


def peak_memory(server):
    """Bytes the server process has held at most since `forget_peak`."""
    status = (Path("/proc") / str(server.process.pid) / "status").read_text()
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", status)[1])


def forget_peak(server):
    (Path("/proc") / str(server.process.pid) / "clear_refs").write_text("5")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux' /proc")
def test_four_hundred_mixed_pictures_fit_in_little_memory(server):
    folder = make(server, "many")
    shapes = [(1600, 1200), (1200, 1600), (1500, 1500), (1920, 1080), (900, 1400)]
    for i, (w, h) in enumerate(shapes):
        noise(w // 8, h // 8, i).resize((w, h)).save(folder / f"0_{i}.jpg")
    for i in range(395):
        data = (folder / f"0_{i % 5}.jpg").read_bytes()
        (folder / f"{i + 1}.jpg").write_bytes(data + i.to_bytes(2, "big"))  # another content
    run_folder(server, "input/fluent3d", "warm", crop="random")
    forget_peak(server)
    before = peak_memory(server)
    outputs, _ = run_folder(server, "input/many")
    assert "input/many: 400 pictures, 400 entries" in outputs["text"][0]
    assert "cache: 0 of 400" in outputs["text"][0]
    grown = peak_memory(server) - before
    assert grown < 400e6, f"{grown / 1e6:.0f} MB"  # decoded, they are 2.2 GB; as floats 9 GB
    again, _ = run_folder(server, "input/many", "again", trigger="sks")
    assert "cache: 400 of 400" in again["text"][0]


@pytest.mark.slow
def test_cores_train_lora_takes_the_outputs_in_one_prompt(server):
    """In half precision: core's node fails on float32 checkpoints in 0.3.75."""
    half = server.base / "models" / "checkpoints" / "half.safetensors"
    with safe_open(checkpoint(), "pt") as file:
        weights = {
            k: file.get_tensor(k).half() if "diffusion_model" in k else file.get_tensor(k)
            for k in file.keys()  # noqa: SIM118
        }
        save_file(weights, half, metadata=file.metadata())
    make(server, "two_sizes", **{f"{i}.png": noise(64 + 32 * i, 64, i) for i in range(3)})
    graph = Graph(server)
    loader = graph("CheckpointLoaderSimple", ckpt_name="half.safetensors")
    data = folder_node(graph, loader, "input/two_sizes")
    lora = graph(
        "TrainLoraNode", model=loader, latents=data, positive=data.out(1), steps=2,
        batch_size=1, rank=1, gradient_checkpointing=False,
    )  # fmt: skip
    ours = graph(
        "SaraTrain", model=loader, latents=data, positive=data.out(1), masks=data.out(2),
        empty=data.out(3), steps=1, batch_size=1, output_name="beside_lora", training_dtype="fp32",
    )  # fmt: skip
    slot = graph.info["TrainLoraNode"]["output"].index("LOSS_MAP")  # moved in 0.33
    plot = graph("LossGraphNode", loss=lora.out(slot))
    outputs = graph.run()
    assert outputs[plot]["images"]
    assert "saved beside_lora_00001" in outputs[ours]["text"][0]


def test_cancel_ends_the_encoding_and_what_is_encoded_is_kept(server):
    make(server, "long", **{f"{i}.png": noise(64, 64, 1000 + i) for i in range(60)})
    cancel_at(server, 10)
    with pytest.raises(PromptError, match="execution_interrupted"):
        run_folder(server, "input/long")
    outputs, _ = run_folder(server, "input/long", "long_again")
    kept = int(re.search(r"cache: (\d+) of 60", outputs["text"][0])[1])
    assert 10 <= kept < 60


def test_bad_combinations_are_explained(server):
    graph = Graph(server)
    checkpoint, model, _ = emoji64(graph)
    data = folder_node(graph, checkpoint, "input/fluent3d")
    one = graph("SolidMask", value=1.0, width=8, height=8)
    two = graph("SolidMask", value=0.5, width=8, height=8)
    both = graph("MaskComposite", destination=one, source=two, x=0, y=0, operation="add")
    common = {"model": model, "latents": data, "positive": data.out(1), "steps": 1}
    graph("SaraTrain", **common, regularisation_latents=data)
    with pytest.raises(PromptError, match="regularisation pictures need their captions"):
        graph.run()
    graph.prompt.pop(max(graph.prompt, key=int))
    train = graph("SaraTrain", **common, masks=both, batch_size=2, output_name="one_mask")
    assert "saved one_mask_00001" in graph.run()[train]["text"][0]
