"""A ComfyUI started with attention that has no gradients trains as one with torch's."""

import comfy.ldm.modules.attention as attention
import pytest
import torch

from .builders import pairs, settings, train


@torch.library.custom_op("sara_test::kernel", mutates_args=())
def without_gradients(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.scaled_dot_product_attention(q, k, v)


def kernel(q, k, v, tensor_layout="HND", **_):
    """As SageAttention: a result that autograd knows nothing of."""
    if tensor_layout == "NHD":
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    out = without_gradients(*(t.detach() for t in (q, k, v)))
    return out.transpose(1, 2) if tensor_layout == "NHD" else out


def trained(sara, patcher, given):
    delta, losses = train(sara, patcher, *given, settings(sara, steps=2, learning_rate=1e-3))
    return losses, {name: entry.values for name, entry in delta.entries.items()}


@pytest.fixture
def sage(monkeypatch):
    """Have all models compute attention by it, as with --use-sage-attention."""
    import sys

    monkeypatch.setattr(attention, "sageattn", kernel, raising=False)
    torchs = attention.optimized_attention
    for module in list(sys.modules.values()):
        if getattr(module, "optimized_attention", None) is torchs:
            monkeypatch.setattr(module, "optimized_attention", attention.attention_sage)


@pytest.mark.parametrize("family", ["sd15", "emoji64"])
def test_a_kernel_without_gradients_is_replaced_while_it_trains(
    request, sara, family, sage, caplog
):
    patcher = request.getfixturevalue(family)
    given = pairs(2) if family == "sd15" else pairs(2, 16, 8, 4096, pooled=2048)
    caplog.set_level("INFO")
    found = trained(sara, patcher, given)
    assert "attention is torch's, as attention_sage has no gradients" in caplog.text
    assert attention.sageattn is kernel  # again, for whoever samples
    request.getfixturevalue("monkeypatch").undo()
    expected = trained(sara, patcher, given)
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    queries = [name for name in found[1] if "to_q" in name or "qkv" in name]
    assert queries
    for name, values in expected[1].items():
        torch.testing.assert_close(found[1][name], values, rtol=1e-3, atol=1e-6)
    assert any(found[1][name].any() for name in queries)


def test_what_a_node_puts_in_place_of_attention_is_left_out(sd15, sara):
    given = pairs(2)
    expected = trained(sara, sd15, given)

    def override(function, q, k, v, heads, *args, **kwargs):
        return function(*(t.detach() for t in (q, k, v)), heads, *args, **kwargs)

    patched = sd15.clone()
    patched.model_options["transformer_options"]["optimized_attention_override"] = override
    losses, values = trained(sara, patched, given)
    assert losses == expected[0]
    for name, value in expected[1].items():
        assert torch.equal(values[name], value), name
    assert "optimized_attention_override" in patched.model_options["transformer_options"]


@pytest.mark.parametrize("name", ["sageattn", "sageattn3_blackwell", "flash_attn_wrapper"])
def test_stand_ins_compute_what_they_stand_for(sara, name):
    from sara_pack.nodes.host.attention import KERNELS

    q, k, v = torch.randn(3, 2, 4, 5, 8).unbind()  # two, four heads, five positions
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    if name == "flash_attn_wrapper":
        found = KERNELS[name](*(t.transpose(1, 2) for t in (q, k, v)), dropout_p=0.0, causal=False)
        found = found.transpose(1, 2)
    else:
        found = KERNELS[name](q, k, v, is_causal=False)
    torch.testing.assert_close(found, expected)
    if name == "sageattn":
        rows = [t.transpose(1, 2) for t in (q, k, v)]
        found = KERNELS[name](*rows, tensor_layout="NHD", attn_mask=None).transpose(1, 2)
        torch.testing.assert_close(found, expected)
