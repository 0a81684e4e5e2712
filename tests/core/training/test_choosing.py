"""Weights chosen by the run's own loss, beside dense gradients of what the model was asked."""

import pytest
import torch
from torch import nn

from sara_core import SaraAdamW
from sara_core.optimizer import gradient_selection
from sara_core.training.choosing import Choosing
from sara_core.training.config import TrainConfig
from sara_core.training.passes import Passes
from sara_core.training.processes import Processes

from .small_run import SETTINGS, Task


class Recorded(Task):
    """Keeps what it was asked."""

    calls: list

    def predict(self, noisy, sigma, pictures, captions):
        self.calls.append((noisy, sigma, pictures, captions))
        return super().predict(noisy, sigma, pictures, captions)


def make(fail=lambda count: None, keeps=False, free=lambda: None, **settings):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(9, 40), nn.Tanh(), nn.Linear(40, 8))
    task = Recorded(net, fail)
    task.calls = []
    if keeps:
        task.training, task.regularisation = range(4), range(4, 7)
    config = TrainConfig(**{**SETTINGS, **settings})
    processes = Processes(torch.device("cpu"), False)
    passes = Passes(task, config)
    return net, task, Choosing(task, config, passes, processes, free)


def dense(net, task, calls):
    """Gradients of passes, of the mean error of the velocity, stacked, by weight."""
    weights, found = [p for p in net.parameters() if p.dim() > 1], []
    for noisy, sigma, pictures, captions in calls:
        x0 = Task.predict(task, noisy, sigma, pictures, captions)
        error = (x0 - task.latents(pictures)) / sigma.view(-1, 1)
        found.append(torch.autograd.grad(error.square().mean(), weights))
    return [torch.stack(gradients) for gradients in zip(*found, strict=True)]


def largest(score, fraction):
    order = score.flatten().sort(descending=True).indices
    return sorted(order[: round(fraction * score.numel())].tolist())


def of_each(choosing, net, fraction, **options):
    return choosing.choose(net, fraction, by_parameter=True, **options)


def listed(selection):
    return [index.tolist() for index in selection.index.values()]


def test_the_runs_own_loss_over_64_pictures_says_what_trains():
    net, task, choosing = make()
    found = of_each(choosing, net, 0.2, most_bytes=1e9)
    shown = [picture for call in task.calls for picture in call[2]]
    assert 64 <= len(shown) < 64 + 3
    assert set(shown) == set(range(7))
    assert {caption for call in task.calls for caption in call[3]} == {0, None}
    assert listed(found) == [largest(g.sum(0).abs(), 0.2) for g in dense(net, task, task.calls)]


def test_regularisation_pictures_are_what_is_kept():
    net, task, choosing = make(keeps=True)
    found = of_each(choosing, net, 0.2, most_bytes=1e9)
    learned = [call for call in task.calls if set(call[2]) <= set(range(4))]
    kept = [call for call in task.calls if set(call[2]) <= set(range(4, 7))]
    assert len(learned) + len(kept) == len(task.calls)
    assert [len(call[2]) for call in kept] == [1] * 128
    scores = []
    for g, of_kept in zip(dense(net, task, learned), dense(net, task, kept), strict=True):
        harm = of_kept.square().sum(0)
        scores.append(g.sum(0).abs() / (harm + 1e-4 * harm.mean()).sqrt())
    assert listed(found) == [largest(score, 0.2) for score in scores]


def test_it_is_the_same_every_time_and_in_parts_of_the_model():
    net, task, choosing = make(keeps=True)
    told = []
    found = of_each(choosing, net, 0.2, tell=lambda *which: told.append(which))
    assert told == [(1, 2), (2, 2)]  # as much is taken as the weights will take that train
    count = len(task.calls)
    task.calls.clear()
    whole = of_each(choosing, net, 0.2, most_bytes=1e9)
    assert len(task.calls) == count // 2
    assert listed(whole) == listed(found)
    other_net, _, other = make(keeps=True, seed=12)
    assert listed(of_each(other, other_net, 0.2)) != listed(found)


def test_where_memory_runs_out_it_goes_on_in_parts():
    freed = []

    def fail(count):
        if count > 1:
            raise torch.OutOfMemoryError("out of memory")

    net, _, choosing = make(fail, free=lambda: freed.append(1))
    found = of_each(choosing, net, 0.2)
    assert len(freed) == 2  # two pictures at a time, and one
    whole_net, _, whole = make()
    assert listed(found) == listed(of_each(whole, whole_net, 0.2))


@pytest.mark.parametrize("act", ["_zeros", "_taken"])
def test_memory_that_runs_out_beside_the_passes_takes_less(monkeypatch, act):
    net, task, choosing = make(keeps=True)
    expected, told, original = of_each(choosing, net, 0.2), [], getattr(gradient_selection, act)

    def fail(*arguments):
        if len(told) == 1:
            raise torch.OutOfMemoryError("out of memory")
        return original(*arguments)

    monkeypatch.setattr(gradient_selection, act, fail)
    found = of_each(choosing, net, 0.2, most_bytes=6000, tell=lambda *which: told.append(which))
    assert told == [(1, 1), (1, 2), (2, 2)]
    assert listed(found) == listed(expected)


def test_memory_that_is_short_for_one_picture_is_an_error():
    def fail(count):
        raise torch.OutOfMemoryError("out of memory")

    net, _, choosing = make(fail)
    with pytest.raises(torch.OutOfMemoryError):
        of_each(choosing, net, 0.2)
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize("keeps", [False, True])
def test_float16_gradients_that_overflow_are_scaled_less(keeps):
    net, task, choosing = make(keeps=keeps)
    expected = listed(of_each(choosing, net, 0.2))
    largest_seen = []

    class Narrow(torch.autograd.Function):
        """Gradients above 3000 are too large for it."""

        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            largest_seen.append(float(gradient.abs().max()))
            return torch.where(gradient.abs() < 3000, gradient, torch.inf)

    predict = task.predict
    task.predict = lambda *asked: Narrow.apply(predict(*asked))
    found = of_each(choosing, net, 0.2, is_float16=True)
    assert max(largest_seen) > 3000 > max(largest_seen[-20:]) > 1
    assert listed(found) == expected


def test_a_model_that_is_not_finite_is_an_error():
    net, _, choosing = make(lambda count: float("nan"))
    with pytest.raises(FloatingPointError, match="not finite while weights were chosen"):
        of_each(choosing, net, 0.2, is_float16=True)


def test_the_optimizer_takes_it():
    net, _, choosing = make()
    optimizer = SaraAdamW(net, selection=choosing.choose(net, 0.2))
    assert optimizer.num_trainable == round(0.2 * (360 + 320))
