"""Factors of the learning rate by layer, against masked torch AdamW with a group for each."""

import copy

import pytest
import torch

from sara_core import SaraAdamW
from sara_core.optimizer.layer_rates import rates_of

from ..helpers import LR, THRESHOLD, Net, loss_of

NAMES = ["blocks.0.attn.q.weight", "blocks.0.mlp.weight", "blocks.1.attn.q.weight", "out.weight"]


def test_text_and_mapping_say_the_same_and_the_last_pattern_counts():
    expected = {"blocks.0.attn.q.weight": 0.5, "blocks.0.mlp.weight": 2.0, "out.weight": 0.1}
    text = "blocks.0.*attn=0.5, mlp = 2\nblocks.1: 3, blocks.1=1, out: 1e-1"
    assert rates_of(NAMES, text) == expected
    pairs = {"blocks.0.*attn": 0.5, "mlp": 2, "blocks.1": 1, "out": 0.1}
    assert rates_of(NAMES, pairs) == expected
    assert rates_of(NAMES, None) == rates_of(NAMES, " ,\n") == {}


@pytest.mark.parametrize("text", ["attn", "attn=fast", "=2", "attn=0", "attn=-1", "attn=inf"])
def test_what_is_no_rate_is_refused(text):
    with pytest.raises(ValueError, match="expected a pattern of names and a factor above 0"):
        rates_of(NAMES, text)


def test_a_pattern_without_a_factor_is_named():
    with pytest.raises(ValueError, match="the rate of 'attn' is ''"):
        rates_of(NAMES, "mlp=2, attn")


def test_a_pattern_that_occurs_nowhere_is_refused():
    with pytest.raises(ValueError, match="'atn' is that of no parameter that trains"):
        SaraAdamW(Net(), THRESHOLD, rates="atn=2")


def test_each_layer_trains_as_masked_adamw_at_its_own_rate():
    net, reference = Net(), Net()
    dense = {name: p for name, p in reference.named_parameters() if p.dim() > 1}
    base = {name: p.detach().clone() for name, p in dense.items()}
    masks = {name: p.detach().abs() < THRESHOLD for name, p in dense.items()}
    factors = {name: 0.25 if "first" in name else 3.0 if "conv" in name else 1.0 for name in dense}
    groups = [{"params": [p], "lr": LR * factors[name]} for name, p in dense.items()]
    adamw = torch.optim.AdamW(groups, weight_decay=0.0)
    optimizer = SaraAdamW(
        net, THRESHOLD, lr=LR, low_rank_weight=0, rates={"first": 0.25, "conv": 3}, weight_decay=0.5
    )
    for step in range(6):
        loss_of(reference, step).backward()
        with torch.no_grad():
            for name, p in dense.items():
                if p.grad is not None:
                    p.grad *= masks[name]
                    p.lerp_(base[name], LR * factors[name] * 0.5)
        adamw.step()
        reference.zero_grad()
        loss_of(net, step).backward()
        optimizer.step()
        optimizer.zero_grad()
    found = dict(net.named_parameters())
    for name, p in dense.items():
        torch.testing.assert_close(found[name], p, rtol=0, atol=1e-6)
    assert not torch.equal(found["conv.weight"], base["conv.weight"])
    resumed = Net()
    again = SaraAdamW(
        resumed,
        THRESHOLD,
        lr=LR,
        low_rank_weight=0,
        rates={"first": 0.25, "conv": 3},
        weight_decay=0.5,
    )
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for n, o in ((net, optimizer), (resumed, again)):
        loss_of(n, 6).backward()
        o.step()
    for one, two in zip(net.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, two)
