"""Operations that ComfyUI makes fast for sampling let gradients pass while a model trains."""

import comfy.ops
import comfy.quant_ops
import pytest
import torch


@pytest.mark.parametrize("offloading", [False, True])
def test_cosmos_attention_lets_gradients_pass(sara, sd15, offloading):
    if not hasattr(getattr(comfy.quant_ops, "ck", None), "rms_rope_split_half"):
        pytest.skip("this ComfyUI has no such operation")
    from comfy.ldm.cosmos.predict2 import Attention

    torch.manual_seed(0)
    layer = Attention(32, None, n_heads=2, head_dim=16, operations=comfy.ops.disable_weight_init)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    x = torch.randn(1, 6, 32)
    angles = torch.randn(6, 8)
    turn = torch.stack([angles.cos(), -angles.sin(), angles.sin(), angles.cos()], -1)
    turn = turn.view(1, 6, 1, 8, 2, 2)
    kitchen = comfy.quant_ops.ck
    fast = kitchen.rms_rope_split_half
    expected = layer(x, rope_emb=turn).detach()
    with pytest.raises(Exception, match="autograd"):
        layer(x, rope_emb=turn).sum().backward()
    layer.zero_grad()
    with sara.host.trainable(sd15, None, offloading=offloading):
        found = layer(x, rope_emb=turn)
        found.square().sum().backward()
    assert kitchen.rms_rope_split_half is fast  # again, for whoever samples
    torch.testing.assert_close(found, expected)
    q = layer.q_proj(x).view(1, 6, 2, 16)
    k = layer.k_proj(x).view(1, 6, 2, 16)
    q, k = (
        norm(t).unflatten(-1, (2, 8)).transpose(-1, -2)  # pairs: one of each half
        for norm, t in ((layer.q_norm, q), (layer.k_norm, k))
    )
    q, k = ((turn @ t[..., None])[..., 0].transpose(-1, -2).flatten(-2) for t in (q, k))
    v = layer.v_proj(x).view(1, 6, 2, 16)
    heads = (t.transpose(1, 2) for t in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
    out = layer.output_proj(out)
    weights = [layer.q_proj.weight, layer.k_norm.weight, layer.v_proj.weight]
    gradients = torch.autograd.grad(out.square().sum(), weights)
    torch.testing.assert_close(out, found)
    for weight, gradient in zip(weights, gradients, strict=True):
        torch.testing.assert_close(weight.grad, gradient)


def test_products_of_half_precision_add_up_in_float32(sara, sd15):
    of_torch = torch.backends.cuda.matmul
    of_torch.allow_fp16_accumulation = True  # as --fast does
    try:
        with sara.host.trainable(sd15, None):
            assert not of_torch.allow_fp16_accumulation
        assert of_torch.allow_fp16_accumulation
    finally:
        of_torch.allow_fp16_accumulation = False
