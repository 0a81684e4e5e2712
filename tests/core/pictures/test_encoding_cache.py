"""The cache of encodings: exact, never half-written, shared and bounded."""

import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from sara_core.pictures import encoding_cache
from sara_core.pictures.encoding_cache import EncodingCache, content_key, weights_digest

MUCH = 1 << 30


def entry(seed=0, size=100):
    generator = torch.Generator().manual_seed(seed)
    return {"latent": torch.randn(4, size, generator=generator), "mask": None, "of": ["a", 1]}


def assert_equal(one, two):
    assert torch.equal(one["latent"], two["latent"])
    assert (one["mask"], one["of"]) == (two["mask"], two["of"])


def test_what_is_kept_comes_back_bit_for_bit(tmp_path):
    cache = EncodingCache(tmp_path / "new", MUCH)
    assert cache.get("k") is None
    assert cache.put("k", entry())
    assert_equal(EncodingCache(tmp_path / "new", MUCH).get("k"), entry())
    assert cache.off().get("k") is None
    assert not cache.off().put("l", entry())
    half = torch.randn(3, 3).bfloat16()
    cache.put("bf16", {"conditioning": [[half, {"pooled_output": None, "guidance": 3.5}]]})
    ((tensor, options),) = cache.get("bf16")["conditioning"]
    assert torch.equal(tensor, half)
    assert options == {"pooled_output": None, "guidance": 3.5}
    with pytest.raises(TypeError):
        cache.put("odd", {"x": object()})


def test_damaged_entries_are_not_there(tmp_path):
    cache = EncodingCache(tmp_path, MUCH)
    cache.put("k", entry())
    (path,) = tmp_path.glob("*.safetensors")
    whole = path.read_bytes()
    for position in range(0, len(whole), 37):
        damaged = bytearray(whole)
        damaged[position] ^= 16
        path.write_bytes(damaged)
        assert cache.get("k") is None, position
        path.write_bytes(whole[:position])
        assert cache.get("k") is None, position
    cache.put("k", entry())
    assert_equal(cache.get("k"), entry())


def test_those_used_longest_ago_go_first(tmp_path):
    cache = EncodingCache(tmp_path, MUCH)
    for i in range(6):
        cache.put(f"k{i}", entry(i))
        os.utime(tmp_path / f"k{i}.safetensors", (1000 + i, 1000 + i))
    size = (tmp_path / "k0.safetensors").stat().st_size
    assert cache.trim() == (6, 6 * size)
    cache.get("k0")  # used now
    bounded = EncodingCache(tmp_path, 3 * size)
    assert bounded.trim() == (3, 3 * size)
    assert [bounded.get(f"k{i}") is not None for i in range(6)] == [True, *[False] * 3, True, True]


def test_unfinished_files_of_killed_processes_go_in_time(tmp_path):
    cache = EncodingCache(tmp_path, MUCH)
    for name, age in (("old", 2 * encoding_cache.ABANDONED), ("new", 0)):
        path = tmp_path / f".{name}.tmp"
        path.write_text("half")
        stamp = path.stat().st_mtime - age
        os.utime(path, (stamp, stamp))
    cache.trim()
    assert [p.name for p in tmp_path.iterdir()] == [".new.tmp"]


def test_many_at_once_write_read_and_trim(tmp_path):
    size = 2 * (len(b"x") * 2000)

    def work(number):
        cache = EncodingCache(tmp_path, size * 3)
        for i in range(20):
            key = f"k{(number + i) % 7}"
            found = cache.get(key)
            if found is not None:
                assert_equal(found, entry((number + i) % 7))
            cache.put(key, entry((number + i) % 7))
            cache.trim()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))


def test_a_full_disk_only_costs_time(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    cache = EncodingCache(blocked / "below", MUCH)
    assert not cache.put("k", entry())
    assert cache.get("k") is None


def test_keys_tell_everything_apart():
    facts = {"picture": "a", "size": (64, 64), "mirrored": False}
    keys = {content_key(**{**facts, **change})
            for change in ({}, {"picture": "b"}, {"size": (64, 80)}, {"mirrored": True})}  # fmt: skip
    assert len(keys) == 4
    assert content_key(**facts) == content_key(**dict(reversed(facts.items())))


def test_other_weights_have_another_digest():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(300, 40), nn.Embedding(5, 3))
    before = weights_digest(net.state_dict())
    assert weights_digest(net.state_dict()) == before
    with torch.no_grad():
        net[0].weight.mul_(1.0001)
    assert weights_digest(net.state_dict()) != before
    assert weights_digest(net.half().state_dict()) != before


def test_a_full_disk_is_the_same_error_from_every_library(tmp_path):
    from safetensors import SafetensorError

    from sara_core.files.atomic import replace_atomically

    def write(path):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    with pytest.raises(OSError, match="No space left on device"):
        replace_atomically(tmp_path / "f", write)
    assert not list(tmp_path.iterdir())


def test_it_stays_bounded_while_entries_are_added(tmp_path):
    one = EncodingCache(tmp_path, MUCH)
    one.put("k", entry())
    size = (tmp_path / "k.safetensors").stat().st_size
    bounded = EncodingCache(tmp_path, 8 * size)
    for i in range(40):
        bounded.put(f"k{i}", entry(i))
        assert sum(p.stat().st_size for p in tmp_path.iterdir()) <= 10 * size
    assert bounded.get("k39") is not None
    left = sorted(tmp_path.iterdir())
    assert bounded.off().trim() == (0, 0)
    assert sorted(tmp_path.iterdir()) == left
