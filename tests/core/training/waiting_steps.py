"""Train on a device made in Python; write what each step waits for.

usage: python -m tests.core.training.waiting_steps
"""

import json
import sys

import torch
from torch import nn

from sara_core import SaraAdamW
from sara_core.training.config import TrainConfig
from sara_core.training.trainer import TrainingRun
from sara_core.weights import quantised
from sara_core.weights.quantised import numbers_on_use

from ...harness.second_device import FAR, Far
from ..optimizer.stored import require_gradients, stored_and_wide
from .small_run import Task

CASES = {
    "on the device": None,
    "weights in main memory": FAR,
    "trained in main memory": torch.device("cpu"),
}
STEPS = 6


class FarTask(Task):
    """The same pictures, on the second device."""

    def latents(self, pictures):
        return super().latents(pictures).to(FAR)

    def predict(self, noisy, sigma, pictures, captions):
        padded = nn.functional.pad(noisy, (0, 8 - noisy.shape[1]))
        caption = torch.tensor(pictures)[:, None].float().to(FAR)
        return self.net(torch.cat([padded, caption / 7], dim=1))[:, : noisy.shape[1]]


def waits(net):
    """What steps wait for, one after the other."""
    optimizer = SaraAdamW(net, fraction=0.5, lr=1e-2, low_rank_weight=1e-2, seed=3)
    config = TrainConfig(steps=STEPS, batch_size=2, grad_accumulation_steps=2, seed=11)
    found = []
    run = iter(TrainingRun(optimizer, FarTask(net), config))
    for _ in range(STEPS):
        Far.waits.clear()
        next(run)
        found.append(dict(Far.waits))
    return found


def case(learned_on):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(9, 40), nn.Tanh(), nn.Linear(40, 8))
    if learned_on is None:
        return waits(net.to(FAR))
    small, converters, _ = stored_and_wide("float8_e4m3fn", net=net)
    for name, parameter in list(small.named_parameters()):
        if name not in converters:
            owner, _, kind = name.rpartition(".")
            setattr(small.get_submodule(owner), kind, nn.Parameter(parameter.detach().to(FAR)))
    scales = dict.fromkeys(converters, torch.tensor(2.0))
    converters = dict.fromkeys(converters, torch.detach)
    with numbers_on_use(small, converters, torch.float32, scales, FAR, learned_on):
        require_gradients(small)
        return waits(small)


def main():
    """Write them as JSON, by case."""
    quantised.SMALL = 0
    json.dump({name: case(place) for name, place in CASES.items()}, sys.stdout)


if __name__ == "__main__":
    main()
