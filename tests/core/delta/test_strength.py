"""The model for a while as with the delta at another strength."""

import copy

import pytest
import torch

from sara_core import SaraAdamW

from ..helpers import Net, loss_of


def steps(net, optimizer, seeds):
    for seed in seeds:
        loss_of(net, seed).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0, -2.0])
def test_the_weights_are_base_plus_strength_times_delta(dtype, strength):
    net = Net().to(dtype)
    base = {name: p.detach().clone() for name, p in net.named_parameters()}
    # After the progressive step parameters have an active and a frozen part.
    optimizer = SaraAdamW(net, 0.05, lr=1e-2, low_rank_weight=0, progressive_step=2)
    steps(net, optimizer, range(4))
    trained = {name: p.detach().clone() for name, p in net.named_parameters()}
    delta = optimizer.delta()
    with optimizer.at_strength(strength):
        for name, parameter in net.named_parameters():
            expected = base[name].float()
            if name in delta.entries:
                entry = delta.entries[name]
                change = torch.zeros_like(expected).flatten()
                change[entry.index.long()] = strength * entry.values
                expected = expected + change.view_as(expected)
            rounding = {"rtol": torch.finfo(dtype).eps, "atol": 1e-7}
            torch.testing.assert_close(parameter.detach(), expected.to(dtype), **rounding)
            if strength == 0:
                assert torch.equal(parameter, base[name])
    for name, parameter in net.named_parameters():
        assert torch.equal(parameter, trained[name])


def test_training_goes_on_as_if_nothing_had_been():
    net = Net()
    twin = copy.deepcopy(net)
    for model, looks in ((net, True), (twin, False)):
        optimizer = SaraAdamW(model, 0.05, lr=1e-2, progressive_step=3)
        steps(model, optimizer, range(2))
        if looks:
            with pytest.raises(KeyError), optimizer.at_strength(0.3):
                raise KeyError("within")
        steps(model, optimizer, range(2, 6))
    for one, other in zip(net.parameters(), twin.parameters(), strict=True):
        assert torch.equal(one, other)
