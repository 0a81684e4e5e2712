"""A MODEL that TorchCompileModel has wrapped trains to the same delta."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from .builders import assert_same_bits, bits, pairs, settings, train
from .quantised import delta_of, load


def compiled(patcher, backend):
    """What the node does; its choices of backends need a compiler or a graphics card."""
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    clone = patcher.clone()
    set_torch_compile_wrapper(model=clone, backend=backend)
    return clone


@pytest.mark.parametrize(("family", "checkpointing"), [("sd15", False), ("emoji64", True)])
def test_the_delta_is_the_same(request, sara, family, checkpointing):
    torch._dynamo.reset()
    patcher = request.getfixturevalue(family)
    given = pairs(3) if family == "sd15" else pairs(3, 16, 8, 4096, pooled=2048)
    options = settings(sara, steps=3, gradient_checkpointing=checkpointing, learning_rate=1e-3)
    before = bits(patcher)
    plain, losses = train(sara, patcher, *given, options)
    counter = CompileCounterWithBackend("aot_eager")
    again, same = train(sara, compiled(patcher, counter), *given, options)
    assert counter.frame_count > 0  # it was compiled, not left aside
    assert same == pytest.approx(losses, rel=1e-4)
    for name, entry in plain.entries.items():
        assert torch.equal(entry.index, again.entries[name].index)
        torch.testing.assert_close(again.entries[name].values, entry.values, rtol=0, atol=2e-5)
    assert_same_bits(before, patcher)


def test_weights_that_become_numbers_on_use_are_not_compiled(sara, caplog):
    patcher = load("e4m3fn")
    plain, _ = delta_of(sara, patcher)
    counter = CompileCounterWithBackend("aot_eager")
    delta, _ = delta_of(sara, compiled(patcher, counter))
    assert counter.frame_count == 0
    assert "the model is not compiled" in caplog.text
    for name, entry in plain.entries.items():
        assert torch.equal(delta.entries[name].values, entry.values), name
