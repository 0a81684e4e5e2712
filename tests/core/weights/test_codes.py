"""Numbers of eight-bit codes against torch's own."""

import pytest
import torch

from sara_core.weights import codes

FORMS = [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.uint8]


@pytest.mark.parametrize("dtype", FORMS)
@pytest.mark.parametrize("out", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [None, torch.tensor(0.0371), torch.tensor([3.5]).half()])
def test_every_code_is_the_number_torch_makes_of_it(monkeypatch, dtype, out, scale):
    monkeypatch.setattr(codes, "CHUNK", 100)
    stored = torch.arange(256, dtype=torch.uint8).view(dtype).view(2, 128)
    expected = stored.float() if scale is None else stored.float() * scale.float()
    found = codes.look_up(stored, scale, torch.empty(2, 128, dtype=out))
    assert torch.equal(found.nan_to_num(7), expected.to(out).nan_to_num(7))
    assert torch.equal(found.isnan(), expected.isnan())


@pytest.mark.parametrize("dtype", FORMS[:2])
@pytest.mark.parametrize("out", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [None, torch.tensor(0.0371), torch.tensor([3.5]).half()])
def test_bits_that_are_moved_are_the_same_numbers(monkeypatch, dtype, out, scale):
    monkeypatch.setattr(codes, "CHUNK", 100)
    every = torch.arange(256, dtype=torch.uint8).view(dtype)
    stored = every[~every.float().isnan()] if dtype == torch.float8_e4m3fn else every
    assert codes.reader(stored) is codes.shift
    expected = (stored.float() if scale is None else stored.float() * scale.float()).to(out)
    found = codes.shift(stored, scale, torch.empty(len(stored), dtype=out))
    assert torch.equal(found.nan_to_num(7), expected.nan_to_num(7))
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.signbit() | found.isnan(), expected.signbit() | found.isnan())


@pytest.mark.parametrize("code", [127, 255])
def test_float8_with_nan_is_looked_up(code):
    stored = torch.tensor([1, 2, code], dtype=torch.uint8).view(torch.float8_e4m3fn)
    assert codes.reader(stored) is codes.look_up


def test_codes_in_another_order_of_memory():
    stored = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)).to(torch.float8_e5m2).t()
    assert torch.equal(codes.look_up(stored, None, torch.empty(6, 4)), stored.float())
