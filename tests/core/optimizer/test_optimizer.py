"""Updates of the selected weights, beside torch's AdamW on dense masked gradients."""

import copy

import pytest
import torch

from sara_core import SaraAdamW

from ..helpers import LR, THRESHOLD, DenseReference, Net, loss_of, pair, sample


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_updates_equal_torchs_adamw_on_masked_dense_gradients(dtype):
    net, optimizer, reference = pair(dtype)
    for seed in range(12):
        loss_of(net, seed).backward()
        optimizer.step()
        optimizer.zero_grad()
        reference.backward(loss_of(reference.net, seed))
        reference.step()
    reference.assert_equals(net)  # bit for bit: the arithmetic is the same
    assert optimizer.num_trainable == sum(int(m.sum()) for m in reference.masks)
    assert all(values.dtype == torch.float32 for values in optimizer.parameters())


def test_accumulated_gradients_add_up():
    net, optimizer, reference = pair()
    for step in range(4):
        for micro in range(3):
            loss_of(net, 10 * step + micro).backward()
            reference.backward(loss_of(reference.net, 10 * step + micro))
        optimizer.step()
        optimizer.zero_grad()
        reference.step()
    reference.assert_equals(net)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_unselected_weights_stay_bit_identical_with_decay_on(dtype):
    net, optimizer, _ = pair(dtype, weight_decay=0.1, low_rank_weight=1e-2)
    before = copy.deepcopy(net)
    for seed in range(8):
        loss_of(net, seed).backward()
        optimizer.step()
        optimizer.zero_grad()
    changed = 0
    for (name, old), new in zip(before.named_parameters(), net.parameters(), strict=True):
        free = (old.float().abs() < THRESHOLD) if old.dim() > 1 else torch.zeros_like(old).bool()
        assert torch.equal(old[~free], new[~free]), name
        changed += int((old != new).sum())
    assert changed > 500


def test_decay_pulls_the_delta_to_zero_and_not_the_weight():
    net, optimizer, reference = pair(weight_decay=0.5)
    reference.decay = 0.5
    for seed in range(6):
        loss_of(net, seed).backward()
        optimizer.step()
        optimizer.zero_grad()
        reference.backward(loss_of(reference.net, seed))
        reference.step()
    reference.assert_equals(net)


def test_torchs_deterministic_mode_gives_the_same_bits():
    nets = []
    for is_deterministic in (False, True):
        net, optimizer, _ = pair(weight_decay=0.5, low_rank_weight=1e-2)
        before = copy.deepcopy(net.state_dict())
        torch.use_deterministic_algorithms(is_deterministic)
        try:
            for seed in range(3):
                loss_of(net, seed).backward()
                optimizer.step()
                optimizer.zero_grad()
            nets.append(copy.deepcopy(net.state_dict()))
            optimizer.restore()
        finally:
            torch.use_deterministic_algorithms(False)
        assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    assert all(torch.equal(v, nets[1][k]) for k, v in nets[0].items())
    assert not all(torch.equal(v, before[k]) for k, v in nets[0].items())


def test_parameters_without_gradient_are_left_alone():
    net, optimizer, _ = pair(weight_decay=0.1)
    before = net.unused.weight.detach().clone()
    loss_of(net, 0).backward()
    optimizer.step()
    assert torch.equal(net.unused.weight, before)
    assert len(optimizer.state) == len(optimizer.parameters()) - 1


def test_clipping_what_the_optimizer_exposes_bounds_the_update():
    net, optimizer, reference = pair()
    loss_of(net, 0).backward()
    reference.backward(loss_of(reference.net, 0))
    norm = torch.nn.utils.clip_grad_norm_(optimizer.parameters(), 1e-3)
    expected = torch.cat([m.grad.flatten() for m in reference.masters if m.grad is not None]).norm()
    assert norm.item() == pytest.approx(expected.item(), rel=1e-5)
    clipped = torch.cat([v.grad for v in optimizer.parameters() if v.grad is not None]).norm()
    assert clipped.item() == pytest.approx(1e-3, rel=1e-3)


def test_scaler_that_skips_a_step_leaves_everything_usable():
    net, optimizer, reference = pair()
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for step in range(4):
        loss = loss_of(net, step)
        if step == 1:
            loss = loss * float("inf")
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if step != 1:
            reference.backward(loss_of(reference.net, step))
            reference.step()
    reference.assert_equals(net)
    assert optimizer.num_steps == 3


def test_everything_selected_equals_full_fine_tuning():
    net = Net()
    twin = copy.deepcopy(net)
    optimizer = SaraAdamW(
        net, fraction=1.0, lr=LR, low_rank_weight=0, biases_and_norms=True, zeros="train"
    )
    full = torch.optim.AdamW(twin.parameters(), lr=LR, weight_decay=0)
    for seed in range(5):
        loss_of(net, seed).backward()
        optimizer.step()
        optimizer.zero_grad()
        full.zero_grad()
        loss_of(twin, seed).backward()
        full.step()
    for a, b in zip(net.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_cuda_agrees_with_the_dense_reference_there(dtype):
    net = Net().to("cuda", dtype)
    reference = DenseReference(copy.deepcopy(net), THRESHOLD, LR)
    optimizer = SaraAdamW(net, THRESHOLD, lr=LR, low_rank_weight=0, progressive_step=2)
    for seed in range(4):
        picture, word = sample(seed, dtype)
        for model in (net, reference.net):
            loss = model(picture.cuda(), word.cuda()).float().square().mean()
            loss.backward() if model is net else reference.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        reference.step()
        if seed == 1:
            reference.reselect()
    for (name, a), b in zip(net.named_parameters(), reference.net.parameters(), strict=True):
        assert torch.allclose(a.float(), b.float(), rtol=1e-2, atol=1e-4), name
    delta = 0.5 * optimizer.delta() + 0.5 * optimizer.delta()
    optimizer.restore()
    delta.apply_to(net)


def test_schedulers_closures_and_defaults_work_as_with_torch():
    net = Net()
    optimizer = SaraAdamW(net, 2e-3)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-3 * 2.718281828459045**-0.7)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)

    def closure():
        optimizer.zero_grad()
        loss = loss_of(net, 0)
        loss.backward()
        return loss

    assert optimizer.step(closure).item() > 0
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] < 1e-3 * 2.718281828459045**-0.7


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr is -1.0"),
        ({"betas": (1.0, 0.9)}, "betas"),
        ({"low_rank_weight": float("nan")}, "low_rank_weight is nan"),
        ({"progressive_step": -1}, "progressive_step is -1"),
    ],
)
def test_bad_settings_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        SaraAdamW(Net(), THRESHOLD, **{"lr": LR, **options})


def test_clipping_inside_the_step_is_clipping_before_it():
    inside, outside = Net(), Net()
    one = SaraAdamW(inside, THRESHOLD, lr=LR, max_grad_norm=1e-3, low_rank_weight=0)
    two = SaraAdamW(outside, THRESHOLD, lr=LR, low_rank_weight=0, eps=1e-8)
    for seed in range(3):
        loss_of(inside, seed).backward()
        loss_of(outside, seed).backward()
        assert torch.nn.utils.clip_grad_norm_(inside.parameters(), 1e-3) == 0  # nothing is there
        assert torch.nn.utils.clip_grad_norm_(two.parameters(), 1e-3) > 1e-3
        one.step()
        norm = torch.cat([leaf.grad for leaf in one.parameters() if leaf.grad is not None]).norm()
        assert norm == pytest.approx(1e-3, rel=1e-3)
        two.step()
        one.zero_grad()
        two.zero_grad()
    for a, b in zip(inside.parameters(), outside.parameters(), strict=True):
        assert torch.equal(a, b)
