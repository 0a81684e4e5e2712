"""Weights chosen by gradient, beside dense gradients that torch makes."""

import copy
import math

import pytest
import torch
from torch import nn

from sara_core import SaraAdamW, Selection, select, select_by_gradient
from sara_core.optimizer import learning_rate
from sara_core.training.memory_need import most_bytes
from sara_core.weights.quantised import numbers_on_use

from ..helpers import Net, loss_of
from .stored import stored_and_wide

TO_LEARN, TO_KEEP = (1, 2, 3), (11, 12, 13, 14)
MATRICES = ["conv.weight", "table.weight", "first.weight", "last.weight"]


def passes(net, seeds=TO_LEARN, counter=None):
    def go_over():
        for seed in seeds:
            loss_of(net, seed).backward()
            if counter is not None:
                counter.append(seed)

    return go_over


def dense(net, seeds):
    """Gradients of each pass, stacked, by name, as a copy of the model has them."""
    net = copy.deepcopy(net)
    found = {name: [] for name in MATRICES}
    for seed in seeds:
        net.zero_grad()
        loss_of(net, seed).backward()
        for name in MATRICES:
            found[name].append(net.get_parameter(name).grad.clone())
    return {name: torch.stack(gradients) for name, gradients in found.items()}


def largest(scores, fraction):
    """Positions of the largest by sorting; weights whose score is 0 are not among them."""
    found = {}
    for name, score in scores.items():
        count = min(round(fraction * score.numel()), int(score.count_nonzero()))
        order = score.flatten().sort(descending=True).indices
        found[name] = sorted(order[:count].tolist())
    return found


def listed(selection):
    return {name: index.tolist() for name, index in selection.index.items()}


def test_the_largest_gradients_of_each_parameter_are_chosen():
    net = Net()
    scores = {name: g.mean(0).abs() for name, g in dense(net, TO_LEARN).items()}
    found = select_by_gradient(net, passes(net), fraction=0.1)
    assert listed(found) == largest(scores, 0.1)
    assert found.threshold == math.inf
    assert found.num_considered == sum(p.numel() for p in net.parameters() if p.dim() > 1)
    assert all(index.dtype == torch.int32 for index in found.index.values())


def test_beside_what_is_kept_importance_counts():
    net = Net()
    learn, keep = dense(net, TO_LEARN), dense(net, TO_KEEP)
    scores = {}
    for name, gradients in learn.items():
        harm = keep[name].double().square().sum(0)
        floor = 1e-4 * harm.mean()
        scores[name] = gradients.double().sum(0).abs() / (harm + floor).sqrt()
    found = select_by_gradient(net, passes(net), passes(net, TO_KEEP), fraction=0.1)
    assert listed(found) == largest(scores, 0.1)
    assert listed(found) != listed(select_by_gradient(net, passes(net), fraction=0.1))


@pytest.mark.parametrize("most", [1, math.inf])
@pytest.mark.parametrize("keep", [(), TO_KEEP])
def test_of_the_whole_model_those_are_chosen_that_rank_first(keep, most):
    net = Net()
    learn, kept = dense(net, TO_LEARN), dense(net, keep or TO_LEARN)
    scores = {}
    for name, gradients in learn.items():
        harm = kept[name].square().sum(0)
        floor = 1e-4 * harm.mean()
        scores[name] = gradients.sum(0).abs() / ((harm + floor).sqrt() if keep else 1)
    found = select_by_gradient(
        net, passes(net), passes(net, keep) if keep else None, fraction=0.1,
        most_bytes=most, by_parameter=False,
    )  # fmt: skip
    assert not found.weight_rates
    every = torch.cat([score.flatten() for score in scores.values()])
    total = sum(p.numel() for p in net.parameters() if p.dim() > 1)
    assert found.num_selected == round(0.1 * total)
    border = every.sort(descending=True).values[found.num_selected - 1]
    for name, score in scores.items():
        taken = torch.zeros(score.numel(), dtype=torch.bool)
        if name in found.index:
            taken[found.index[name].long()] = True
        flat = score.flatten()
        assert taken[flat > border * 1.1].all(), name  # an eighth of an octave
        assert not taken[flat < border / 1.1].any(), name
    shares = [len(found.index.get(name, ())) / score.numel() for name, score in scores.items()]
    assert max(shares) > 1.5 * min(shares)


@pytest.mark.parametrize("most", [1, 8 * 96 * 8, math.inf])
def test_in_parts_the_same_is_chosen(most):
    net, learned, kept = Net(), [], []
    whole = select_by_gradient(net, passes(net), passes(net, TO_KEEP), fraction=0.2)
    found = select_by_gradient(
        net,
        passes(net, counter=learned),
        passes(net, TO_KEEP, kept),
        fraction=0.2,
        most_bytes=most,
    )
    assert listed(found) == listed(whole)
    parts = {1: 5, 8 * 96 * 8: 4, math.inf: 1}[most]  # the unused layer is one of them
    assert (len(learned), len(kept)) == (parts * len(TO_LEARN), parts * len(TO_KEEP))


def test_weights_without_a_gradient_are_left_out():
    net = Net()

    def learn():
        picture = torch.zeros(1, 3, 4, 4)
        picture[:, 0] = 1.0  # the other channels of the kernel get none
        net(picture, torch.tensor([2])).square().mean().backward()

    found = select_by_gradient(net, learn, fraction=0.9)
    assert set(found.index) == set(MATRICES)  # the unused layer is not there
    assert found.index["conv.weight"].tolist() == [
        position for position in range(216) if position // 9 % 3 == 0
    ]
    assert found.index["table.weight"].tolist() == list(range(24, 36))


def test_of_equal_ones_as_many_are_chosen_as_are_asked_for():
    net = nn.Linear(20, 5, bias=False)
    found = select_by_gradient(net, lambda: net(torch.ones(20)).sum().backward(), fraction=0.3)
    assert found.num_selected == 30
    assert found.index["weight"].diff().max() <= 4  # spread evenly


def test_the_model_is_left_as_it_was():
    net = Net()
    net.first.weight.requires_grad_(False)
    before = copy.deepcopy(net.state_dict())
    loss_of(net, 0).backward()
    found = select_by_gradient(
        net, passes(net), passes(net, TO_KEEP), fraction=0.1, include="weight"
    )
    assert "first.weight" not in found.index
    for name, parameter in net.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.requires_grad == (name != "first.weight")
        assert parameter.grad is None
        assert not parameter._post_accumulate_grad_hooks
    loss_of(net, 0).backward()
    assert net.last.weight.grad is not None


def test_an_error_within_a_pass_leaves_the_model_as_it_was():
    net = Net()

    def fail():
        loss_of(net, 0).backward()
        raise RuntimeError("the disk is on fire")

    with pytest.raises(RuntimeError, match="on fire"):
        select_by_gradient(net, fail, fraction=0.1)
    assert all(p.grad is None and not p._post_accumulate_grad_hooks for p in net.parameters())


def test_what_is_not_finite_is_told_by_name():
    net = Net()
    with pytest.raises(FloatingPointError, match=r"conv\.weight.*not finite"):
        select_by_gradient(net, lambda: (loss_of(net, 0) * math.inf).backward(), fraction=0.1)


def test_nothing_to_choose_from_is_refused():
    net = Net()
    with pytest.raises(ValueError, match="none of the chosen parameters has got a gradient"):
        select_by_gradient(net, lambda: None, fraction=0.1)
    for fraction in (0.0, 1.5, -0.1):
        with pytest.raises(ValueError, match="above 0 and at most 1"):
            select_by_gradient(net, lambda: None, fraction=fraction)


@pytest.mark.parametrize(("by_parameter", "most"), [(True, 3.5), (False, 4.6)])
def test_one_dense_gradient_at_a_time_beside_the_sums(by_parameter, most):
    net = nn.Sequential(*[nn.Linear(2048, 2048, bias=False) for _ in range(5)])
    layer = 2048 * 2048 * 4

    def learn():
        net(torch.ones(1, 2048)).sum().backward()

    def choose():
        select_by_gradient(
            net, learn, fraction=0.1, most_bytes=2 * layer, by_parameter=by_parameter
        )

    # Two sums and a gradient; and a byte for each weight of the five layers.
    assert 3 * layer < most_bytes(torch.device("cpu"), choose) < most * layer


@pytest.mark.parametrize("form", ["float8_e4m3fn", "scaled int8", "float16"])
def test_of_weights_in_few_bits_the_same_are_chosen(form):
    net, converters, wide = stored_and_wide(form)
    expected = select_by_gradient(wide, passes(wide), passes(wide, TO_KEEP), fraction=0.2)
    with numbers_on_use(net, converters, torch.float32):
        net.requires_grad_(True)
        found = select_by_gradient(net, passes(net), passes(net, TO_KEEP), fraction=0.2)
    assert listed(found) == listed(expected)


def test_the_optimizer_trains_what_was_chosen():
    net, twin = Net(), Net()
    selection = select_by_gradient(net, passes(net), fraction=0.1)
    optimizer = SaraAdamW(net, selection=selection, lr=1e-2, low_rank_weight=0, progressive_step=2)
    masks = {}
    for name, index in selection.index.items():
        mask = masks[name] = torch.zeros_like(twin.get_parameter(name))
        mask.view(-1)[index.long()] = 1.0
    adamw = torch.optim.AdamW([twin.get_parameter(n) for n in masks], lr=1e-2, weight_decay=0.0)
    for step in range(4):
        loss_of(net, step).backward()
        loss_of(twin, step).backward()
        for name, mask in masks.items():
            twin.get_parameter(name).grad.mul_(mask)
        for each in (optimizer, adamw):
            each.step()
            each.zero_grad()
    for name in masks:
        torch.testing.assert_close(net.get_parameter(name), twin.get_parameter(name))
    assert optimizer.num_trainable == selection.num_selected  # size is no matter half way either
    assert "sara.threshold" not in optimizer.delta().metadata
    restored = Net()
    optimizer.restore()
    assert all(map(torch.equal, net.parameters(), restored.parameters()))


def test_a_saved_run_goes_on_with_what_was_chosen():
    net, again = Net(), Net()
    options = {"lr": 1e-2, "low_rank_weight": 0}
    selection = select_by_gradient(net, passes(net), fraction=0.1)
    optimizer = SaraAdamW(net, selection=selection, **options)
    other = None
    for step in range(4):
        if step == 2:
            other = SaraAdamW(again, fraction=0.1, **options)
            other.load_state_dict(optimizer.state_dict())
        for model, each in ((net, optimizer), (again, other)):
            if each is not None:
                loss_of(model, step).backward()
                each.step()
                each.zero_grad()
    assert all(map(torch.equal, net.parameters(), again.parameters()))
    assert other.threshold == math.inf


def test_the_rate_goes_with_the_share():
    net = Net()
    selection = select_by_gradient(net, passes(net), fraction=0.04)
    optimizer = SaraAdamW(net, selection=selection)
    share = selection.num_selected / selection.num_considered
    assert optimizer.param_groups[0]["lr"] == pytest.approx(2e-5 / share**0.5)
    assert learning_rate.rule_of_gradient(0.04) == pytest.approx(1e-4)


def test_a_selection_that_does_not_fit_is_refused():
    net = Net()
    selection = select_by_gradient(net, passes(net), fraction=0.1)
    with pytest.raises(ValueError, match="leave out fraction"):
        SaraAdamW(net, selection=selection, fraction=0.1)
    with pytest.raises(ValueError, match=r"does not fit.*conv\.weight"):
        SaraAdamW(net, selection=selection, exclude="conv")
    small, large = nn.Linear(2, 2), nn.Linear(20, 2)
    found = select_by_gradient(large, lambda: large(torch.ones(20)).sum().backward(), fraction=0.5)
    with pytest.raises(ValueError, match=r"no ascending positions within \['weight'\]"):
        SaraAdamW(small, selection=found)


@pytest.mark.parametrize("which", ["learned", "kept"])
def test_one_infinite_gradient_is_told(which):
    net = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Linear(4, 2, bias=False))

    def go_over(is_infinite):
        net(torch.ones(1, 3)).sum().backward()
        if is_infinite:
            (net[1](torch.ones(1, 4))[0, 0] * torch.inf).backward()

    with pytest.raises(FloatingPointError, match=r"'1\.weight' was not finite"):
        select_by_gradient(
            net, lambda: go_over(which == "learned"), lambda: go_over(which == "kept"), fraction=0.5
        )


def test_a_model_that_is_being_trained_is_refused():
    net = Net()
    optimizer = SaraAdamW(net, fraction=0.1)
    with pytest.raises(RuntimeError, match="already being trained by another SaraAdamW"):
        select_by_gradient(net, passes(net), fraction=0.1)
    loss_of(net, 0).backward()
    assert any(leaf.grad is not None for leaf in optimizer.parameters())


def test_sums_are_float32_whatever_the_default_is():
    net = Net()
    expected = listed(select_by_gradient(net, passes(net), fraction=0.1))
    go_over = passes(net)

    def learn():
        torch.set_default_dtype(torch.float32)
        go_over()
        torch.set_default_dtype(torch.bfloat16)

    torch.set_default_dtype(torch.bfloat16)
    try:
        found = select_by_gradient(net, learn, fraction=0.1)
    finally:
        torch.set_default_dtype(torch.float32)
    assert listed(found) == expected


@pytest.mark.parametrize("index", [[3, 1], [-1, 2], [1, 1], [0.0, 1.0], []])
def test_positions_that_do_not_ascend_are_refused(index):
    net = nn.Linear(4, 4, bias=False)
    dtype = torch.float32 if index[:1] == [0.0] else torch.int32
    positions = torch.tensor(index, dtype=dtype)
    with pytest.raises(ValueError, match=r"no ascending positions within \['weight'\]"):
        SaraAdamW(net, selection=Selection(math.inf, {"weight": positions}, 16, 0, False))


def test_a_share_that_was_selected_by_size_has_its_rate():
    net = Net()
    selection = select(dict(net.named_parameters()), fraction=0.03)
    optimizer = SaraAdamW(net, selection=selection, biases_and_norms=True)
    expected = learning_rate.rule_of_share(selection.num_selected / selection.num_considered)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(expected)
