"""What a batch's loss is, weighted and in parts."""

import pytest
import torch

from sara_core.training.passes import Passes

from .small_run import make


@pytest.mark.parametrize("num_parts", [1, 3])
def test_the_loss_of_a_batch_is_weighted_and_that_of_validation_is_not(num_parts):
    _, plain = make(lambda count: None)
    _, weighted = make(lambda count: None, loss_weighting="min_snr", snr_gamma=0.5)
    draw = plain.passes.draw([0, 1, 2], torch.Generator().manual_seed(3))
    losses, sigma = plain.passes.losses(*draw).detach(), draw[2]
    snr = (
        (1 - sigma) / sigma
    ) ** 2  # a flow, whose error in x0 is sigma times that of its velocity
    expected = (losses * snr.clamp(max=0.5) * sigma**2).mean()
    weighted.passes.num_parts = num_parts
    assert float(weighted.passes.backward(draw, 1.0)) == pytest.approx(float(expected), rel=1e-5)
    assert float(plain.passes.backward(draw, 1.0)) == pytest.approx(float(losses.mean()), rel=1e-5)
    assert not torch.isclose(expected, losses.mean(), rtol=0.1)
    assert float(weighted.passes.total_loss(draw, num_parts).detach()) == pytest.approx(
        float(losses.sum()), rel=1e-5
    )


def test_a_share_without_pictures_leaves_a_scaler_that_can_unscale():
    _, run = make()
    scaler = torch.amp.GradScaler("cpu", 4.0)
    passes = Passes(run.task, run.config, scaler)
    draw = passes.draw([0, 1, 2], torch.Generator(), mine=slice(0, 0))
    assert float(passes.backward(draw, 1.0)) == 0.0
    assert scaler.get_scale() == 4.0
    leaf = torch.nn.Parameter(torch.ones(2))
    leaf.grad = torch.full((2,), 8.0)
    scaler.unscale_(torch.optim.SGD([leaf], 0.1))
    assert leaf.grad.tolist() == [2.0, 2.0]


def test_what_is_learned_is_drawn_as_set_and_what_is_measured_as_the_family_does():
    settings = {
        "timestep_distribution": "logit_normal", "logit_mean": 2.0, "lowest_noise": 0.3,
        "noise_offset": 0.5, "caption_dropout": 1.0,
    }  # fmt: skip
    _, run = make(**settings)
    _, plain = make()
    run.task.pictures = plain.task.pictures = [torch.zeros(1, 2, 1, 400)] * 7
    pictures = [0, 1, 2] * 200

    def drawn(which, **options):
        return which.passes.draw(pictures, torch.Generator().manual_seed(0), **options)

    _, _, sigma, noise, captions = drawn(run, to_learn=True)
    assert sigma.min() >= 0.3
    assert captions == [None] * 600
    means = noise.mean(3).flatten()  # of noise that is the same in a channel, and of 400 numbers
    assert means.std().item() == pytest.approx((0.25 + 1 / 400) ** 0.5, rel=0.05)
    assert (noise - noise.mean(3, keepdim=True)).std().item() == pytest.approx(1, rel=0.01)
    _, _, measured, own_noise, kept = drawn(run)
    assert 0.3 <= measured.min() < measured.median() < sigma.median() - 0.2
    assert not any(kept)
    assert own_noise.mean(3).std() < 0.06
    _, family = make(lowest_noise=0.3)
    family.task.pictures = plain.task.pictures
    assert torch.equal(drawn(family)[2], measured)


class Several:
    """Captions of the small run's pictures: of picture 1 three to draw from, of the others one."""

    def __init__(self, task):
        self.task, self.seen = task, []

    def __getattr__(self, name):
        return getattr(self.task, name)

    def longest_caption(self, picture):
        return 0

    def captions_to_learn(self, picture):
        return range(1, 4) if picture == 1 else range(1)

    def predict(self, noisy, sigma, pictures, captions):
        self.seen += zip(pictures, captions, strict=True)
        return self.task.predict(noisy, sigma, pictures, captions)


def test_one_of_several_captions_is_drawn_to_learn_and_the_first_measured():
    _, run = make(caption_dropout=0.25)
    task = Several(run.task)
    passes = Passes(task, run.config)
    pictures = [0, 1, 2] * 800
    generator = torch.Generator().manual_seed(0)
    *_, captions = passes.draw(pictures, generator, to_learn=True)
    counts = {number: captions[1::3].count(number) for number in (None, 1, 2, 3)}
    assert sum(counts.values()) == 800
    assert counts[None] == pytest.approx(200, abs=40)
    assert all(counts[number] == pytest.approx(200, abs=40) for number in (1, 2, 3))
    assert set(captions[0::3]) == {0, None}
    assert passes.draw(pictures, generator)[-1] == [0] * 2400
    part = passes.draw(pictures, torch.Generator().manual_seed(0), True, slice(100, 200))
    assert part[-1] == captions[100:200]  # as another process draws it


def test_a_choice_of_captions_changes_nothing_where_there_is_none():
    _, run = make()
    one, two = (torch.Generator().manual_seed(1) for _ in range(2))
    run.passes.draw([0, 1], one, to_learn=True)
    Passes(Several(run.task), run.config).draw([0, 1], two, to_learn=True)
    assert not torch.equal(one.get_state(), two.get_state())
    run.passes.draw([0, 1], two, to_learn=True)
    torch.rand(2, generator=one)
    run.passes.draw([0, 1], one, to_learn=True)
    assert torch.equal(one.get_state(), two.get_state())


def test_pictures_held_out_are_measured_in_parts_where_memory_is_short():
    def fail(count):
        if count > 1:
            raise torch.OutOfMemoryError("out of memory")

    _, plain = make()
    freed = []
    _, short = make(fail, free=lambda: freed.append(1))
    for run in (plain, short):
        run.task.training, run.task.validation = range(3, 7), (0, 1, 2)
    assert short.validate() == pytest.approx(plain.validate(), rel=1e-6)
    assert len(freed) == 2  # for two parts, and then for four
    assert short.validate() == pytest.approx(plain.validate(), rel=1e-6)
    assert len(freed) == 2
    _, hopeless = make(lambda count: fail(2))
    hopeless.task.validation = (0,)
    with pytest.raises(torch.OutOfMemoryError):
        hopeless.validate()
