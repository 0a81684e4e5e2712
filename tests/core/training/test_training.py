"""Learning rate, order of pictures, settings and the loop around them."""

import math
from collections import Counter
from itertools import islice

import pytest
import torch
from torch import nn

from sara_core import SaraAdamW
from sara_core.optimizer.learning_rate import factor, rule, rule_of_share
from sara_core.training.batches import BatchOrder
from sara_core.training.config import TrainConfig
from sara_core.training.objective import NoiseSchedule
from sara_core.training.trainer import TrainingRun


def test_rule_gives_the_papers_rates_and_beyond_its_thresholds_the_last_one():
    for threshold, rate in ((2e-4, 9.32e-4), (2e-3, 4.97e-4), (5e-3, 1.738e-4)):
        assert rule(threshold) == pytest.approx(rate, rel=5e-3)
    assert rule(6e-3) == rule(1.0) == rule(5e-3)


def test_a_share_has_the_more_rate_the_smaller_it_is():
    rates = {1.0: 1.25e-5, 0.3: 4.17e-5, 0.1: 1.25e-4, 0.03: 4.17e-4, 0.01: 1e-3, 1e-4: 1e-3}
    assert {share: rule_of_share(share) for share in rates} == pytest.approx(rates, rel=1e-2)
    model = torch.nn.Linear(100, 100)
    for options, rate in (
        ({"fraction": 0.2}, 6.25e-5),
        ({"fraction": 0.2, "by_parameter": False}, rule(1.0)),
    ):
        optimizer = SaraAdamW(model, **options)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(rate)
        optimizer.restore()


def test_schedules_by_hand():
    assert [factor(s, 10, "constant", 4) for s in (0, 1, 3, 4, 9)] == [0.25, 0.5, 1.0, 1.0, 1.0]
    assert [factor(s, 6, "linear", 2) for s in range(6)] == [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    assert factor(5, 10, "cosine") == pytest.approx(0.5)
    assert factor(9, 10, "cosine") == pytest.approx(0.5 * (1 + math.cos(0.9 * math.pi)))
    assert [factor(s, 12, "cosine_restarts", cycles=3) for s in (0, 4, 8)] == [1.0] * 3
    assert factor(2, 12, "cosine_restarts", cycles=3) == pytest.approx(0.5)
    assert factor(7, 12, "cosine_restarts", cycles=3) == factor(3, 12, "cosine_restarts", cycles=3)
    assert factor(9, 10, "cosine_restarts") == factor(9, 10, "cosine")
    courses = [factor(s, 12, "constant_then_linear", 2) for s in range(12)]
    assert courses == pytest.approx([0.5, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0.5])
    with pytest.raises(ValueError, match="'poly'; expected one of constant, linear, cosine"):
        factor(0, 10, "poly")


def test_every_epoch_shows_each_picture_once_in_batches_of_one_size():
    keys = ["wide"] * 7 + ["tall"] * 4 + ["square"]
    generator = torch.Generator().manual_seed(0)
    per_epoch = 3 + 2 + 1
    stream = BatchOrder(keys, 3, generator)
    epochs = [list(islice(stream, per_epoch)) for _ in range(3)]
    for epoch in epochs:
        assert Counter(i for batch in epoch for i in batch) == Counter(range(12))
        assert all(len({keys[i] for i in batch}) == 1 for batch in epoch)
        assert max(map(len, epoch)) == 3
    assert epochs[0] != epochs[1]
    again = BatchOrder(keys, 3, torch.Generator().manual_seed(0))
    assert list(islice(again, per_epoch)) == epochs[0]
    with pytest.raises(ValueError, match="0 pictures"):
        BatchOrder([], 1, generator)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"steps": 1, "batch_size": 0}, "batch_size is 0"),
        ({"steps": 1, "caption_dropout": 1.5}, "caption_dropout is 1.5"),
        ({"steps": 1, "loss_function": "mae"}, "loss_function is 'mae'; expected one of mse, l1"),
        ({"steps": 1, "lr_schedule": "exp"}, "lr_schedule is 'exp'"),
        ({"steps": 1, "max_grad_norm": float("inf")}, "max_grad_norm is inf"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**settings)


class Task:
    """Six latents of two sizes; the 'model' maps a latent and its caption number to x0."""

    def __init__(self, net):
        self.net = net
        self.schedule = NoiseSchedule("flow", "uniform", lambda t: 0.1 + 0.8 * t)
        generator = torch.Generator().manual_seed(5)
        self.pictures = [torch.randn(1, 6 if i < 4 else 3, generator=generator) for i in range(6)]
        self.keys = [p.shape for p in self.pictures]
        self.training, self.regularisation, self.validation = range(6), (), ()
        self.calls = []

    def mask(self, pictures):
        return None

    def longest_caption(self, picture):
        return 0

    def captions_to_learn(self, picture):
        return range(1)

    def latents(self, pictures):
        return torch.cat([self.pictures[i] for i in pictures])

    def predict(self, noisy, sigma, pictures, captions):
        self.calls.append((noisy.detach(), sigma, pictures, captions))
        padded = nn.functional.pad(noisy, (0, 6 - noisy.shape[1]))
        return self.net(padded)[:, : noisy.shape[1]]


def run(**settings):
    torch.manual_seed(0)
    net = nn.Linear(6, 6)
    task = Task(net)
    optimizer = SaraAdamW(net, fraction=0.5, lr=1e-2, low_rank_weight=0)
    config = TrainConfig(**{"steps": 6, "batch_size": 2, **settings})
    return net, task, list(TrainingRun(optimizer, task, config))


def test_reports_follow_the_schedule_and_loss_is_the_objectives():
    net, task, reports = run(steps=4, lr_schedule="linear", max_grad_norm=0)
    assert [r.step for r in reports] == [1, 2, 3, 4]
    assert [r.learning_rate for r in reports] == pytest.approx([1e-2, 7.5e-3, 5e-3, 2.5e-3])
    torch.manual_seed(0)
    fresh = nn.Linear(6, 6)
    noisy, sigma, pictures, _ = task.calls[0]
    width = noisy.shape[1]
    x0 = fresh(nn.functional.pad(noisy, (0, 6 - width)))[:, :width]
    error = (x0 - task.latents(pictures)) / sigma[:, None]
    assert reports[0].loss == pytest.approx(error.square().mean().item(), rel=1e-5)


def test_pictures_keep_their_own_noise_level_and_caption():
    _, task, _ = run(steps=30, caption_dropout=0.5)
    flags = []
    for noisy, sigma, pictures, captions in task.calls:
        assert len(pictures) == len(sigma) == len(captions) == len(noisy)
        assert len(sigma.unique()) == len(sigma)
        flags += [caption is None for caption in captions]
    assert 0.25 < sum(flags) / len(flags) < 0.75
    assert not any(d for call in run(steps=5)[1].calls for d in call[3])


def test_accumulation_averages_over_its_passes():
    net, task, reports = run(steps=2, grad_accumulation_steps=3, batch_size=1, max_grad_norm=0)
    assert len(task.calls) == 6
    torch.manual_seed(0)
    fresh = nn.Linear(6, 6)
    losses = []
    for noisy, sigma, pictures, _ in task.calls[:3]:
        width = noisy.shape[1]
        x0 = fresh(nn.functional.pad(noisy, (0, 6 - width)))[:, :width]
        losses.append(((x0 - task.latents(pictures)) / sigma[:, None]).square().mean().item())
    assert reports[0].loss == pytest.approx(sum(losses) / 3, rel=1e-5)


def test_same_seed_same_weights_and_global_generator_untouched():
    state = torch.get_rng_state()
    nets = [run(seed=seed)[0].weight for seed in (3, 3, 4)]
    torch.set_rng_state(state)
    assert torch.equal(nets[0], nets[1])
    assert not torch.equal(nets[0], nets[2])


def test_loop_does_not_touch_the_global_generator():
    torch.manual_seed(0)
    net = nn.Linear(6, 6)
    optimizer = SaraAdamW(net, fraction=0.5, lr=1e-2)
    state = torch.get_rng_state()
    list(TrainingRun(optimizer, Task(net), TrainConfig(steps=3, caption_dropout=0.5)))
    assert torch.equal(torch.get_rng_state(), state)


def test_clipping_bounds_the_gradient_of_the_update():
    torch.manual_seed(0)
    net = nn.Linear(6, 6)
    optimizer = SaraAdamW(net, fraction=0.5, lr=1e-2, low_rank_weight=10.0)
    norms = []
    step = optimizer.step

    def spy():
        norms.append(torch.cat([v.grad for v in optimizer.parameters()]).norm().item())
        step()

    optimizer.step = spy
    list(TrainingRun(optimizer, Task(net), TrainConfig(steps=3, max_grad_norm=0.1)))
    assert norms == pytest.approx([0.1] * 3, rel=1e-3)  # the low-rank gradient included


def test_loss_scaling_gives_the_same_result():
    plain = run(steps=3)[0].weight
    torch.manual_seed(0)
    net = nn.Linear(6, 6)
    optimizer = SaraAdamW(net, fraction=0.5, lr=1e-2, low_rank_weight=0)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    list(TrainingRun(optimizer, Task(net), TrainConfig(steps=3, batch_size=2), scaler))
    assert torch.equal(net.weight, plain)


def losses_of(task, call, net=None):
    """Squared errors of a recorded call, by the untrained net."""
    torch.manual_seed(0)
    net = net or nn.Linear(6, 6)
    noisy, sigma, pictures, _ = call
    width = noisy.shape[1]
    x0 = net(nn.functional.pad(noisy, (0, 6 - width)))[:, :width]
    return ((x0 - task.latents(pictures)) / sigma[:, None]).square()


def dense_gradient(task, call):
    torch.manual_seed(0)
    net = nn.Linear(6, 6)
    losses_of(task, call, net).mean().backward()
    return net.weight.grad.flatten()


def make(net_seed=0, **settings):
    torch.manual_seed(net_seed)
    net = nn.Linear(6, 6)
    task = Task(net)
    optimizer = SaraAdamW(net, fraction=0.5, lr=1e-2, low_rank_weight=0)
    config = {"steps": 1, "batch_size": 2, "max_grad_norm": 0, **settings}
    return net, task, optimizer, TrainConfig(**config)


def test_masked_areas_do_not_count():
    net, task, optimizer, config = make()
    masks = torch.rand(6, 6, generator=torch.Generator().manual_seed(1)).round()
    masks[2] = 0
    task.mask = lambda pictures: masks[pictures][:, : task.pictures[pictures[0]].shape[1]]
    for seed in range(5):
        net, task_, optimizer, config = make(seed=seed, batch_size=4)
        task_.mask = task.mask
        training = TrainingRun(optimizer, task_, config)
        (report,) = list(training)
        (call,) = task_.calls
        mask = task.mask(call[2])
        expected = (losses_of(task_, call) * mask).sum(1) / mask.sum(1).clamp(min=1e-6)
        assert report.loss == pytest.approx(expected.mean().item(), rel=1e-5)
        assert 2 not in call[2] or expected[call[2].index(2)] == 0


def test_a_batch_in_parts_counts_masks_the_same():
    masks = torch.rand(6, 6, generator=torch.Generator().manual_seed(1))
    nets = []
    for parts in (1, 2, 4):
        net, task, optimizer, config = make(steps=3, batch_size=4)
        task.mask = lambda p, t=task: masks[p][:, : t.pictures[p[0]].shape[1]]
        training = TrainingRun(optimizer, task, config)
        training._num_parts = parts
        list(training)
        nets.append(net.weight)
    assert torch.allclose(nets[0], nets[1], atol=1e-6)
    assert torch.allclose(nets[0], nets[2], atol=1e-6)


def test_regularisation_pictures_have_their_own_batches_and_weight():
    _, task, optimizer, config = make(steps=40)
    task.training, task.regularisation = [0, 1, 4], [2, 3, 5]
    reports = list(TrainingRun(optimizer, task, config))
    assert all(set(c[2]) <= {0, 1, 4} for c in task.calls[::2])
    assert all(set(c[2]) <= {2, 3, 5} for c in task.calls[1::2])
    seen = Counter(i for call in task.calls for i in call[2])
    assert set(seen.values()) == {20}  # two batches make an epoch of either set
    first, prior = task.calls[:2]
    assert reports[0].loss == pytest.approx(losses_of(task, first).mean().item(), rel=1e-5)
    assert reports[0].regularisation_loss == pytest.approx(
        losses_of(task, prior).mean().item(), rel=1e-5
    )

    for weight in (0.0, 0.5, 2.0):
        _, task, optimizer, config = make(regularisation_weight=weight)
        task.training, task.regularisation = [0, 1, 4], [2, 3, 5]
        TrainingRun(optimizer, task, config)._draws.backward(None, optimizer.no_sync)
        dense = torch.zeros(36)
        for call, share in zip(task.calls, (1.0, weight), strict=False):
            dense += share * dense_gradient(task, call)
        (entry,) = optimizer.delta().entries.values()
        found = torch.cat([p.grad.flatten() for p in optimizer.parameters()])
        assert torch.allclose(found, dense[entry.index.long()], atol=1e-6)


def test_validation_is_the_same_every_time_and_touches_nothing():
    net, task, optimizer, config = make(steps=6, caption_dropout=0.5)
    task.training, task.validation = [0, 1, 4], [2, 3, 5]
    training = TrainingRun(optimizer, task, config)
    before = training.validate()
    calls = list(task.calls)
    assert Counter(i for call in calls for i in call[2]) == {2: 4, 3: 4, 5: 4}
    assert not any(flag for call in calls for flag in call[3])
    expected = sum(losses_of(task, call).mean(1).sum().item() for call in calls) / 12
    assert before == pytest.approx(expected, rel=1e-5)
    assert training.validate() == before
    assert all(p.grad is None for p in net.parameters())

    with_validation = []
    for report in training:
        with_validation.append(report)
        training.validate()
    _, task2, optimizer2, _ = make()
    task2.training = [0, 1, 4]
    assert list(TrainingRun(optimizer2, task2, config)) == with_validation
    _, task3, optimizer3, _ = make()
    assert TrainingRun(optimizer3, task3, config).validate() is None
