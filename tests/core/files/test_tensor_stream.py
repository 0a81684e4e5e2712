"""Files written a piece at a time: read by safetensors, whole or not there."""

import hashlib

import pytest
import torch
from safetensors.torch import safe_open

from sara_core.files.tensor_stream import write_streamed


def write_two(stream):
    stream.write(torch.tensor([1.5, -2.0]).view(torch.uint8).numpy().data)
    stream.flush()
    stream.write(b"\x07")
    stream.write(b"\x09")
    return {
        "__metadata__": {"digest": stream.digest.hexdigest(), "size": str(stream.size)},
        "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
        "b": {"dtype": "U8", "shape": [2], "data_offsets": [8, 10]},
    }


@pytest.mark.parametrize("room", [400, 401, 407])
def test_safetensors_reads_what_was_streamed(tmp_path, room):
    path = tmp_path / "file.safetensors"
    write_streamed(path, room, write_two)
    with safe_open(path, framework="pt") as file:
        assert file.get_tensor("a").tolist() == [1.5, -2.0]
        assert file.get_tensor("b").tolist() == [7, 9]
        metadata = file.metadata()
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    assert start % 8 == 0
    assert len(data) == start + 10
    assert metadata == {"digest": hashlib.sha256(data[start:]).hexdigest(), "size": "10"}


def test_what_was_there_stays_if_the_header_does_not_fit(tmp_path):
    path = tmp_path / "file.safetensors"
    path.write_bytes(b"before")
    with pytest.raises(ValueError, match="more than the 64 left"):
        write_streamed(path, 64, write_two)
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]
