"""What the optimizer does to a model, and takes back."""

import copy
import gc

import pytest
import torch
from torch import nn

from sara_core import SaraAdamW

from ..helpers import LR, THRESHOLD, DenseReference, Net, loss_of, pair, sample


def test_no_dense_gradient_outlives_its_layers_backward():
    net, optimizer, _ = pair()
    alive = []
    for parameter in filter(lambda p: p.requires_grad, net.parameters()):
        parameter.register_hook(
            lambda g: alive.append([p.grad is not None for p in net.parameters()])
        )
    loss_of(net, 0).backward()
    assert len(alive) == 4
    assert not any(any(row) for row in alive)
    assert all(parameter.grad is None for parameter in net.parameters())
    assert [v.grad.shape for v in optimizer.parameters() if v.grad is not None]


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_update(reentrant):
    net, optimizer, reference = pair()
    picture, word = sample(0)
    picture.requires_grad_()
    out = torch.utils.checkpoint.checkpoint(net, picture, word, use_reentrant=reentrant)
    out.square().mean().backward()
    optimizer.step()
    reference.backward(loss_of(reference.net, 0))
    reference.step()
    reference.assert_equals(net)


def test_tied_transposed_and_sparse_gradient_weights_train():
    torch.manual_seed(0)
    table = nn.Embedding(50, 30, sparse=True)
    head = nn.Linear(30, 50, bias=False)
    head.weight = nn.Parameter(torch.randn(30, 50).T)
    assert not head.weight.is_contiguous()
    tied = nn.Linear(30, 30, bias=False)
    net = nn.ModuleDict(
        {"table": table, "a": tied, "b": nn.Linear(30, 30, bias=False), "head": head}
    )
    net["b"].weight = tied.weight

    def loss(n):
        return n["head"](n["b"](torch.tanh(n["a"](n["table"](torch.arange(5)))))).square().mean()

    twin = copy.deepcopy(net)
    twin["table"].sparse = False
    optimizer = SaraAdamW(net, 0.1, lr=LR, low_rank_weight=0)
    reference = DenseReference(twin, 0.1, LR)
    for _ in range(3):
        loss(net).backward()
        optimizer.step()
        optimizer.zero_grad()
        reference.backward(loss(twin))
        reference.step()
    reference.assert_equals(net)
    assert not net["head"].weight.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_restore_brings_the_same_bits_flags_and_objects_back(dtype):
    net = Net().to(dtype)
    net.norm.requires_grad_(False)
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    flags = {n: p.requires_grad for n, p in net.named_parameters()}
    objects = dict(net.named_parameters())
    optimizer = SaraAdamW(net, THRESHOLD, lr=0.1, progressive_step=2)
    for seed in range(4):
        loss_of(net, seed).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not torch.equal(net.last.weight, before["last.weight"])
    optimizer.restore()
    for name, parameter in net.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter is objects[name]
        assert parameter.requires_grad == flags[name]
        assert not parameter._post_accumulate_grad_hooks
    with pytest.raises(RuntimeError, match="detached from its model"):
        optimizer.step()


def test_two_optimizers_on_one_model_are_refused_until_the_first_lets_go():
    net, optimizer, _ = pair()
    with pytest.raises(RuntimeError, match="already being trained .* restore\\(\\) or detach"):
        SaraAdamW(net, THRESHOLD, lr=LR)
    loss_of(net, 0).backward()
    optimizer.step()
    optimizer.detach()
    assert SaraAdamW(net, THRESHOLD, lr=LR).num_trainable > 0


def test_a_forgotten_optimizer_no_longer_takes_gradients_away():
    net, optimizer, reference = pair()
    del optimizer, reference
    gc.collect()
    net.requires_grad_(True)
    loss_of(net, 0).backward()
    assert net.last.weight.grad.abs().sum() > 0


def test_moving_or_converting_the_model_afterwards_is_said():
    net, optimizer, _ = pair()
    loss_of(net, 0).backward()
    net.half()
    with pytest.raises(RuntimeError, match=r"is now torch\.float16 .* was torch\.float32"):
        optimizer.step()


def test_float8_weights_are_refused():
    net = nn.Linear(8, 8)
    net.weight = nn.Parameter(net.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(ValueError, match="requires_grad=False"):
        SaraAdamW(net, 0.1)
    net.weight.requires_grad_(True)
    with pytest.raises(TypeError, match="'weight' \\(torch.float8_e4m3fn\\)"):
        SaraAdamW(net, 0.1)


def test_what_was_learned_outlasts_restore_and_later_changes():
    for ending in ("restore", "detach"):
        torch.manual_seed(0)
        net = nn.Linear(20, 20)
        optimizer = SaraAdamW(net, fraction=0.3, lr=1e-2)
        for _ in range(3):
            net(torch.randn(5, 20)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        before = optimizer.delta().entries["weight"].values.clone()
        state = optimizer.state_dict()["sara"]["weights"][0]["values"].clone()
        getattr(optimizer, ending)()
        with torch.no_grad():
            net.weight.fill_(3.0)
        assert torch.equal(optimizer.delta().entries["weight"].values, before)
        assert torch.equal(optimizer.state_dict()["sara"]["weights"][0]["values"], state)
        assert before.abs().min() > 0


def test_layers_that_get_no_gradient_are_named_once(caplog):
    caplog.set_level("INFO")
    net = nn.ModuleDict({"used": nn.Linear(40, 40), "idle": nn.Linear(40, 4)})
    optimizer = SaraAdamW(net, fraction=0.5, lr=1e-3, low_rank_weight=0)
    for _ in range(2):
        net["used"](torch.ones(1, 40)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    count = int((optimizer.delta().entries["idle.weight"].values == 0).sum())
    (record,) = [r for r in caplog.records if "have got no gradient" in r.message]
    assert record.levelname == "WARNING"
    assert record.message.startswith(f"{count} selected weights (")
    assert record.message.endswith("in idle.weight")
