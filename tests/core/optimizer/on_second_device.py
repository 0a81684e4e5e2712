"""Train with weights that wait in main memory for another device; write what differs from training without.

usage: python -m tests.core.optimizer.on_second_device
"""

import json
import sys

import torch
from torch import nn

from sara_core import SaraAdamW
from sara_core.training.gradient_checkpointing import checkpointed
from sara_core.weights import quantised
from sara_core.weights.quantised import bytes_on, keep_on_device, numbers_on_use

from ...harness.second_device import FAR, Far
from .stored import OPTIONS, require_gradients, stored_and_wide

CASES = {
    "trained there": {},
    "trained in main memory": {"learned_on": torch.device("cpu")},
    "half of the weights stay there": {"share": 0.5},
    "clipped, with decay": {
        "learned_on": torch.device("cpu"), "low_rank_weight": 0.0, "max_grad_norm": 0.01, "weight_decay": 0.5,
    },
    "moments in eight bits": {  # whose codes would turn a last bit of the low-rank term into a step
        "learned_on": torch.device("cpu"), "moments": "8bit", "low_rank_weight": 0.0,
    },
    "checkpointed": {"checkpointing": True},
}  # fmt: skip


class Block(nn.Module):
    """Two linear layers beside a way past them."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(64, 96), nn.Linear(96, 64)

    def forward(self, x):
        return x + self.second(torch.tanh(self.first(x)))


class Blocks(nn.Module):
    """Three of them, and a large convolution."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.conv = nn.Conv1d(32, 32, 4)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.conv(x.view(-1, 32, 2).repeat(1, 1, 2))


def loss_of(net, seed, device=None):
    x = torch.randn(2, 64, generator=torch.Generator().manual_seed(seed))
    return net(x.to(device or x.device)).square().sum()


def learn(net, device, steps=4, checkpointing=False, **options):
    """Train and go on from the state; returns the delta, and where trained values were."""
    options = {**OPTIONS, "progressive_step": 2, **options}
    optimizer = SaraAdamW(net, **options)
    for step in range(steps):
        if step == steps - 1:
            state = optimizer.state_dict()
            optimizer.restore()
            optimizer.detach()
            optimizer = SaraAdamW(net, **options)
            optimizer.load_state_dict(state)
        with checkpointed(net, checkpointing):
            loss_of(net, step, device).backward()
        optimizer.step()
        optimizer.zero_grad()
    places = {str(leaf.device) for leaf in optimizer.parameters()}
    delta = optimizer.delta()
    optimizer.restore()
    return delta, places


def case(form, learned_on=None, share=0.0, **options):
    """Return the largest difference of any learned value, and what was where, in bytes."""
    small, converters, wide = stored_and_wide(form, net=Blocks())
    expected, _ = learn(wide, None, **options)
    for name, parameter in list(small.named_parameters()):
        if name not in converters:
            owner, _, kind = name.rpartition(".")
            setattr(small.get_submodule(owner), kind, nn.Parameter(parameter.detach().to(FAR)))
    stored = sum(small.get_parameter(name).nbytes for name in converters)
    if form == "float32":
        converters = dict.fromkeys(converters, torch.detach)
    with numbers_on_use(small, converters, torch.float32, {}, FAR, learned_on):
        require_gradients(small)
        kept = keep_on_device(small, share * stored)
        held = sum(bytes_on(FAR, small.get_parameter(name)) for name in converters)
        Far.sent = 0
        delta, places = learn(small, FAR, **options)
        first = sum(block.first.weight.source.stored.nbytes for block in small.blocks)
        acting = [p for p in small.parameters() if isinstance(p, quantised.Quantised)]
        in_main_memory = all(p.source.stored.device.type == "cpu" for p in acting)
    pairs = [(delta.entries[name], entry) for name, entry in expected.entries.items()]
    worst = max((own.values - entry.values).abs().max().item() for own, entry in pairs)
    largest = max(entry.values.abs().max().item() for entry in expected.entries.values())
    return {
        "same positions": all(torch.equal(own.index, entry.index) for own, entry in pairs),
        "first layers": first,
        "difference": worst, "largest": largest, "places": sorted(places), "kept": kept, "held": held,
        "stored": stored, "sent": Far.sent, "stays": in_main_memory,
    }  # fmt: skip


def main():
    """Write the results of all cases as JSON, by form and case."""
    quantised.SMALL = 0
    found = {
        f"{form}, {name}": case(form, **options)
        for form in ("float32", "float16", "float8_e4m3fn", "scaled float8")
        for name, options in CASES.items()
    }
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
