"""A base is recognised in whatever precision its file was stored and loaded."""

import itertools

import pytest
import torch

from sara_core.weights.fingerprint import is_same_base, take_fingerprint

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
NOTHING = {f"{i}.weight": torch.zeros(0, dtype=torch.int32) for i in range(5)}


def weights(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(30, 20, generator=generator) * 0.02 for name in NOTHING}


def stored(base, file, loaded):
    return {name: weight.to(file).to(loaded) for name, weight in base.items()}


@pytest.mark.parametrize(("file", "loaded"), list(itertools.product(DTYPES, DTYPES)))
def test_copies_of_a_checkpoint_in_any_precision_are_the_same_base(file, loaded):
    base = weights()
    for other_file, other_loaded in itertools.product(DTYPES, DTYPES):
        fingerprint = take_fingerprint(stored(base, other_file, other_loaded), base)
        assert is_same_base(fingerprint, stored(base, file, loaded), NOTHING)


@pytest.mark.parametrize("dtype", DTYPES)
def test_another_base_or_a_fine_tune_is_not(dtype):
    base = weights()
    fingerprint = take_fingerprint(stored(base, dtype, dtype), base)
    assert not is_same_base(fingerprint, stored(weights(1), dtype, dtype), NOTHING)
    tuned = {name: weight * 1.03 for name, weight in base.items()}  # by three per cent
    assert not is_same_base(fingerprint, stored(tuned, dtype, torch.float32), NOTHING)


def test_full_precision_is_compared_at_full_precision():
    base = weights()
    fingerprint = take_fingerprint(base, base)
    tuned = {name: weight * (1 + 1e-5) for name, weight in base.items()}
    assert not is_same_base(fingerprint, tuned, NOTHING)
