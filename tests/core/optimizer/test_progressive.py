"""When half the run is over: which weights go on, with what."""

import torch
from torch import nn

from sara_core import SaraAdamW

from ..helpers import loss_of, pair


def test_progressive_adjustment_freezes_what_left_and_keeps_the_moments():
    net, optimizer, reference = pair(progressive_step=5, lr=2e-2)
    reference.lr = 2e-2
    first = optimizer.num_trainable
    for step in range(10):
        if step == 5:
            reference.reselect()
            learned = [m.detach().clone() for m in reference.masters]
        loss_of(net, step).backward()
        optimizer.step()
        optimizer.zero_grad()
        reference.backward(loss_of(reference.net, step))
        reference.step()
    reference.assert_equals(net)
    assert optimizer.stage == 2
    assert 0 < optimizer.num_trainable < first
    assert optimizer.num_trainable == sum(int(m.sum()) for m in reference.masks)
    for master, old, mask in zip(reference.masters, learned, reference.masks, strict=True):
        assert torch.equal(master[~mask], old[~mask])
    assert optimizer.delta().num_values == first  # frozen ones stay in the delta


def test_gradient_gathered_before_the_switch_is_used():
    net, optimizer, reference = pair(lr=2e-2)
    for step in range(6):
        loss_of(net, step).backward()
        reference.backward(loss_of(reference.net, step))
        if step == 3:
            optimizer.reselect()
            reference.reselect()
            assert any(v.grad is not None for v in optimizer.parameters())
        optimizer.step()
        optimizer.zero_grad()
        reference.step()
    reference.assert_equals(net)


def test_progressive_step_zero_keeps_one_stage():
    net, optimizer, _ = pair(progressive_step=0)
    for step in range(3):
        loss_of(net, step).backward()
        optimizer.step()
    assert optimizer.stage == 1


def test_switch_that_would_leave_nothing_is_skipped_with_a_warning(caplog):
    net = nn.Linear(4, 4, bias=False)
    optimizer = SaraAdamW(net, 10.0, lr=100.0, low_rank_weight=0, progressive_step=1)
    net(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    assert (optimizer.stage, optimizer.num_trainable) == (1, 16)
    assert "all 16 trained weights have left their threshold" in caplog.text
