import hashlib
import json
import os
import struct
import tracemalloc

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sara_core import DeltaEntry, SparseDelta
from sara_core.delta import packed_positions
from sara_core.files.tensor_stream import TensorStream


def random_delta(numel, density, seed=0, name="blocks.0.weight", columns=100):
    generator = torch.Generator().manual_seed(seed)
    index = torch.nonzero(torch.rand(numel, generator=generator) < density)[:, 0].int()
    values = torch.randn(len(index), generator=generator) * 1e-3
    return SparseDelta({name: DeltaEntry(index, values, (numel // columns, columns))})


def by_the_specification(path):
    """Read a delta as docs/delta-format.md tells it, bit by bit, without the core."""
    with open(path, "rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
        data = file.read()
    table = json.loads(header["__metadata__"]["sara.parameters"])
    tensors = {k: data[slice(*header[k]["data_offsets"])] for k in ("values", "positions")}
    values = np.frombuffer(tensors["values"], np.float16)
    result, first_value, first_byte = {}, 0, 0
    for name, _shape, count, width, size in table:
        block = tensors["positions"][first_byte : first_byte + size]
        bits = [byte >> i & 1 for byte in block for i in range(8)]
        unary = iter(bits[8 * ((count * width + 7) // 8) :])
        position, found = -1, []
        for i in range(count):
            low = sum(bits[i * width + b] << b for b in range(width))
            high = 0
            while next(unary) == 0:
                high += 1
            position += (high << width) + low + 1
            found.append(position)
        result[name] = (found, values[first_value : first_value + count])
        first_value, first_byte = first_value + count, first_byte + size
    return result


def test_round_trip_is_exact(tmp_path):
    a, b = random_delta(5000, 0.1), random_delta(3000, 0.01, 1, "b", 30)
    delta = SparseDelta({**a.entries, **b.entries}, {"sara.threshold": "0.002", "note": "x"})
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        delta.save(tmp_path / "d.safetensors", dtype)
        loaded = SparseDelta.load(tmp_path / "d.safetensors")
        assert list(loaded.entries) == list(delta.entries)
        for name, old in delta.entries.items():
            new = loaded.entries[name]
            assert torch.equal(new.index, old.index)
            assert torch.equal(new.values, old.values.to(dtype))
            assert new.shape == old.shape
        assert loaded.metadata["note"] == "x"
    assert os.listdir(tmp_path) == ["d.safetensors"]


def test_file_can_be_read_from_the_specification_alone(tmp_path):
    a, b = random_delta(700, 0.2), random_delta(900, 0.01, 1, "b", 30)
    delta = SparseDelta({**a.entries, **b.entries})
    delta.save(tmp_path / "d.safetensors")
    for name, (index, values) in by_the_specification(tmp_path / "d.safetensors").items():
        assert index == delta.entries[name].index.tolist()
        assert values.tolist() == delta.entries[name].values.half().tolist()


@pytest.mark.parametrize("width", [0, 1, 3, 7, 8, 9, 31, packed_positions.MAX_WIDTH])
def test_positions_of_any_width_are_read(width, monkeypatch):
    monkeypatch.setattr(packed_positions, "_best_width", lambda gaps: width)
    near = np.flatnonzero(np.random.default_rng(0).random(100_000) < 0.1)
    far = 2**31 - 2 if width > 7 else near[-1] + 1000  # few ones in the unary part
    index = np.append(near, far)
    for dtype, limit in ((np.int32, 2**31 - 1), (np.int64, 2**40)):
        _, packed = packed_positions.encode(index.astype(dtype))
        found = packed_positions.decode(packed, width, len(index), limit)
        assert found.dtype == dtype
        np.testing.assert_array_equal(found, index)


def test_as_many_positions_as_need_wide_sums_are_read(monkeypatch):
    index = np.flatnonzero(np.random.default_rng(0).random(100_000) < 0.1).astype(np.int32)
    width, packed = packed_positions.encode(index)
    monkeypatch.setattr(packed_positions, "MANY", 1000)
    found = packed_positions.decode(packed, width, len(index), 100_000)
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found, index)


@pytest.mark.parametrize("density", [0.005, 0.02, 0.1, 0.2])
def test_file_needs_at_most_3_2_bytes_a_weight(density, tmp_path):
    delta = random_delta(8_000_000, density)
    delta.save(tmp_path / "d.safetensors")
    assert os.path.getsize(tmp_path / "d.safetensors") <= 3.2 * delta.num_values


def test_layers_of_unequal_density_stay_within_the_bound(tmp_path):
    a, b = random_delta(1_000_000, 0.045), random_delta(9_000_000, 0.0006, 1, "b")
    delta = SparseDelta({**a.entries, **b.entries})
    assert delta.num_values > 0.005 * 10_000_000
    delta.save(tmp_path / "d.safetensors")
    assert os.path.getsize(tmp_path / "d.safetensors") <= 3.2 * delta.num_values


def test_header_of_3000_layers_is_below_a_mebibyte(tmp_path):
    one = random_delta(1000, 0.1).entries["blocks.0.weight"]
    name = "diffusion_model.double_blocks.{}.img_attn.some.quite.long.name.proj.weight"
    SparseDelta({name.format(i): one for i in range(3000)}).save(tmp_path / "d.safetensors")
    header = struct.unpack("<Q", (tmp_path / "d.safetensors").read_bytes()[:8])[0]
    assert header < 1 << 20
    assert SparseDelta.load(tmp_path / "d.safetensors").num_values == 3000 * len(one.index)


def test_metadata_holds_modelspec_and_the_hash_of_the_data(tmp_path):
    random_delta(5000, 0.1).save(tmp_path / "style.safetensors")
    raw = (tmp_path / "style.safetensors").read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    metadata = json.loads(raw[8 : 8 + size])["__metadata__"]
    assert metadata["modelspec.hash_sha256"] == "0x" + hashlib.sha256(raw[8 + size :]).hexdigest()
    assert metadata["modelspec.title"] == "style"
    assert {"sai_model_spec", "architecture", "implementation"} <= {
        key.removeprefix("modelspec.") for key in metadata if key.startswith("modelspec.")
    }
    assert all(isinstance(value, str) for value in metadata.values())


def test_a_failed_save_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "d.safetensors"
    random_delta(500, 0.1).save(path)
    before = path.read_bytes()

    write = TensorStream.write

    def full(stream, piece):
        if stream.size:
            raise OSError(28, "No space left on device")
        write(stream, piece)

    monkeypatch.setattr(TensorStream, "write", full)
    with pytest.raises(OSError, match="No space left"):
        random_delta(500, 0.2).save(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["d.safetensors"]


def test_the_file_gets_the_usual_permissions(tmp_path):
    random_delta(500, 0.1).save(tmp_path / "d.safetensors")
    (tmp_path / "plain").write_text("x")
    assert (tmp_path / "d.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_values_that_are_not_finite_are_not_saved(tmp_path):
    delta = random_delta(500, 0.1)
    for factor in (float("nan"), 1e9):
        with pytest.raises(ValueError, match="NaN, infinite or too large"):
            (delta * factor).save(tmp_path / "d.safetensors")
    with pytest.raises(ValueError, match="delta is empty"):
        SparseDelta({}).save(tmp_path / "d.safetensors")
    with pytest.raises(ValueError, match="cannot be saved as torch.int8"):
        delta.save(tmp_path / "d.safetensors", torch.int8)
    assert not os.listdir(tmp_path)


def rewrite(path, change):
    """Change the tensors and the table of a sound delta file, keeping it a safetensors file."""
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    metadata.pop("modelspec.hash_sha256")
    text = metadata["sara.parameters"]
    table = json.loads(text)
    change(tensors, table, metadata)
    if metadata["sara.parameters"] == text:
        metadata["sara.parameters"] = json.dumps(table)
    save_file(tensors, path, {k: v for k, v in metadata.items() if v is not None})


def encoded(*index):
    width, packed = packed_positions.encode(np.array(index, dtype=np.int64))
    return width, torch.from_numpy(packed)


def out_of_range(tensors, table, metadata):
    width, tensors["positions"] = encoded(0, 1, 600)
    table[0][2:] = [3, width, len(tensors["positions"])]
    tensors["values"] = torch.zeros(3, dtype=torch.float16)


def overflowing_low_bits(tensors, table, metadata):
    count = (1 << 23) + 4096  # all-ones low bits of width 40 add up to 2**63
    unary = torch.full((count // 8,), 255, dtype=torch.uint8)
    tensors["positions"] = torch.cat([torch.full((count * 5,), 255, dtype=torch.uint8), unary])
    tensors["values"] = torch.zeros(count, dtype=torch.float16)
    table[0][1:] = [[1 << 50], count, 40, len(tensors["positions"])]


def many_ones(tensors, table, metadata):
    tensors["positions"] = torch.full((1_000_000,), 255, dtype=torch.uint8)
    tensors["values"] = torch.zeros(1, dtype=torch.float16)
    table[0][2:] = [1, 0, 1_000_000]


def set_row(column, value):
    def change(tensors, table, metadata):
        table[0][column] = value

    return change


def set_metadata(key, value):
    def change(tensors, table, metadata):
        metadata[key] = value

    return change


def set_tensor(key, value):
    def change(tensors, table, metadata):
        tensors[key] = value(tensors[key])

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (out_of_range, "out of range: 600, expected less than 500"),
        (overflowing_low_bits, "cannot hold 8392704 positions of 40 low bits"),
        (many_ones, "8000000 positions are packed where 1 were announced"),
        (set_row(1, [1] * 40_000), "40000 dimensions"),
        (set_row(2, 10**15), "cannot have 1000000000000000 trained weights"),
        (set_row(1, [2**40, 2**40]), "cannot have"),
        (set_row(1, [-5, -100]), "not whole or out of range"),
        (set_row(1, [0, 100]), "cannot have"),
        (set_row(1, "5x100"), "is not \\[name, shape"),
        (set_row(2, 7), "announces 7 values"),
        (set_row(2, True), "not whole"),
        (set_row(3, 60), "cannot hold"),
        (set_row(4, 2**50), "bytes of positions"),
        (set_row(0, 5), "not by text"),
        (set_metadata("sara.version", "99"), "format version '99'"),
        (set_metadata("sara.format", None), "another kind of file"),
        (set_metadata("sara.parameters", "[" * 100_000), "not readable JSON"),
        (set_metadata("sara.parameters", "{}"), "not a list"),
        (set_metadata("sara.parameters", None), "not readable JSON"),
        (set_tensor("values", lambda t: t[:-1]), "announces"),
        (set_tensor("values", lambda t: t.fill_(float("nan"))), "NaN or infinite"),
        (set_tensor("values", lambda t: t.view(1, -1)), "2 dimensions"),
        (set_tensor("positions", lambda t: t.to(torch.int32)), "torch.int32"),
        (set_tensor("positions", lambda t: t.fill_(255)), "were announced"),
        (set_tensor("positions", lambda t: t.fill_(0)), "were announced"),
        (lambda t, table, m: t.update(more=torch.zeros(1)), "expected positions and values"),
        (lambda t, table, m: table.append(table[0]), "twice"),
    ],
)
def test_hostile_files_are_refused_quickly_by_name(change, message, tmp_path):
    path = tmp_path / "bad.safetensors"
    random_delta(500, 0.1).save(path)
    rewrite(path, change)
    tracemalloc.start()
    with pytest.raises(ValueError, match=message) as caught:
        SparseDelta.load(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert str(path) in str(caught.value)
    assert peak < 10_000_000 + 3 * path.stat().st_size


def test_foreign_truncated_empty_and_flipped_files_are_refused(tmp_path):
    path = tmp_path / "d.safetensors"
    random_delta(5000, 0.1).save(path)
    whole = path.read_bytes()
    for cut in (0, 4, 100, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match="cannot be used as a SaRA delta"):
            SparseDelta.load(path)
    path.write_bytes(whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:])
    with pytest.raises(ValueError, match="checksum"):
        SparseDelta.load(path)
    save_file({"lora_unet_x.lora_up.weight": torch.zeros(2, 2)}, path)
    with pytest.raises(ValueError, match="looks like a LoRA; load it with Load LoRA"):
        SparseDelta.load(path)
    with pytest.raises(FileNotFoundError, match="no such delta file"):
        SparseDelta.load(tmp_path / "none.safetensors")


def test_golden_bytes(tmp_path):
    index = torch.tensor([0, 1, 5, 6, 30, 31], dtype=torch.int32)
    values = torch.tensor([1.0, -1.0, 0.5, 0.25, 2.0, 0.0])
    SparseDelta({"w": DeltaEntry(index, values, (4, 8))}).save(tmp_path / "d.safetensors")
    tensors = load_file(tmp_path / "d.safetensors")
    # Gaps 0 0 3 0 23 0. Two low bits each: 00 00 11 00 11 00. Rest 0 0 0 0 5 0: 1 1 1 1 000001 1.
    assert tensors["positions"].tolist() == [0b00110000, 0b0011, 0b00001111, 0b00000110]
    assert tensors["values"].tolist() == values.tolist()


@pytest.mark.parametrize("key", ["sara.threshold", "sara.steps"])
def test_metadata_of_another_kind_name_the_file_and_the_fault(tmp_path, key):
    entry = DeltaEntry(torch.tensor([1], dtype=torch.int32), torch.ones(1), (2, 2))
    SparseDelta({"w": entry}, {key: "many"}).save(tmp_path / "odd.safetensors")
    message = (
        rf"odd\.safetensors cannot be used as a SaRA delta: its {key} is 'many', expected a number"
    )
    with pytest.raises(ValueError, match=message):
        SparseDelta.load(tmp_path / "odd.safetensors")
