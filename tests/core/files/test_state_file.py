"""Files of states: every kind of value, and damage."""

import pytest
import torch

from sara_core.files import state_file
from sara_core.files.state_file import read_state, write_state


def test_states_keep_every_kind_of_value(tmp_path):
    state = {
        "numbers": [1, 2.5, 1e-300, True, None, "text"], 3: {0: torch.arange(3)},
        "half": torch.ones(2, dtype=torch.bfloat16), "empty": torch.zeros(0), "scalar": torch.tensor(7.0),
    }  # fmt: skip
    write_state(tmp_path / "s.safetensors", state)
    found = read_state(tmp_path / "s.safetensors")
    assert found["numbers"] == state["numbers"]
    assert found[3][0].tolist() == [0, 1, 2]
    assert torch.equal(found["half"], state["half"])
    assert (found["empty"].shape, found["scalar"].item()) == ((0,), 7.0)


def test_damaged_states_are_refused(tmp_path):
    path = tmp_path / "s.safetensors"
    write_state(path, {"a": torch.arange(100), "b": 5})
    whole = path.read_bytes()
    for position in (9, len(whole) // 2, len(whole) - 1):
        flipped = bytearray(whole)
        flipped[position] ^= 1
        path.write_bytes(flipped)
        with pytest.raises(ValueError, match="cannot be used to resume"):
            read_state(path)
    path.write_bytes(whole[:-10])
    with pytest.raises(ValueError, match="cannot be used to resume"):
        read_state(path)
    with pytest.raises(FileNotFoundError, match="no such state"):
        read_state(tmp_path / "none")


def test_text_that_no_header_holds_is_kept_beside_the_tensors(tmp_path, monkeypatch):
    path = tmp_path / "s.safetensors"
    state = {"identity": ["é" * 99] * 700_000, "a": torch.arange(3)}  # more than 100 MB
    write_state(path, state)
    found = read_state(path)
    assert found["identity"] == state["identity"]
    assert found["a"].tolist() == [0, 1, 2]
    monkeypatch.setattr(state_file, "MOST_TEXT", 10)
    write_state(path, {"b": ["text"] * 9, "c": torch.ones(2)})
    damaged = bytearray(path.read_bytes())
    damaged[damaged.rindex(b"text")] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match="cannot be used to resume"):
        read_state(path)
