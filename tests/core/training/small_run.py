"""A small model and run, shared by the tests of this folder."""

import torch
from torch import nn

from sara_core import SaraAdamW
from sara_core.training.config import TrainConfig
from sara_core.training.objective import NoiseSchedule
from sara_core.training.trainer import TrainingRun


class Task:
    """Seven latents of two sizes and a two-layer 'model'; `fail` runs before each prediction."""

    def __init__(self, net, fail=lambda count: None):
        self.net, self.fail = net, fail
        self.schedule = NoiseSchedule("flow", "logit_normal", lambda t: t)
        generator = torch.Generator().manual_seed(5)
        self.pictures = [torch.randn(1, 8 if i < 5 else 4, generator=generator) for i in range(7)]
        self.keys = [p.shape for p in self.pictures]
        self.training, self.regularisation, self.validation = range(7), (), ()

    def mask(self, pictures):
        return None

    def longest_caption(self, picture):
        return 0

    def captions_to_learn(self, picture):
        return range(1)

    def latents(self, pictures):
        return torch.cat([self.pictures[i] for i in pictures])

    def predict(self, noisy, sigma, pictures, captions):
        scale = self.fail(len(pictures))
        padded = nn.functional.pad(noisy, (0, 8 - noisy.shape[1]))
        kept = torch.tensor([caption is not None for caption in captions])
        caption = torch.tensor(pictures) * kept
        out = self.net(torch.cat([padded, caption[:, None] / 7], dim=1))[:, : noisy.shape[1]]
        return out if scale is None else out * scale


SETTINGS = {
    "steps": 12, "batch_size": 3, "grad_accumulation_steps": 2, "caption_dropout": 0.3, "warmup_steps": 3,
    "seed": 11,
}  # fmt: skip


def make(
    fail=lambda count: None, fraction=0.5, free=lambda: None, tweak=None, scaler=None, **settings
):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(9, 40), nn.Tanh(), nn.Linear(40, 8))
    if tweak is not None:
        tweak(net)
    optimizer = SaraAdamW(
        net, fraction=fraction, lr=1e-2, low_rank_weight=1e-2, progressive_step=6, seed=3
    )
    config = TrainConfig(**{**SETTINGS, **settings})
    return net, TrainingRun(optimizer, Task(net, fail), config, scaler, free_memory=free)


def outcome(net, run):
    tensors = [*net.state_dict().values()]
    for state in run.optimizer.state.values():
        tensors += [state["exp_avg"], state["exp_avg_sq"], state["step"]]
    return tensors


def assert_equal(one, two):
    assert len(one) == len(two)
    for a, b in zip(one, two, strict=True):
        assert torch.equal(a, b)
