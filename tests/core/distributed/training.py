"""A training script as people write it, run by torchrun in several processes and by the tests in one.

usage: torchrun --nproc-per-node N -m tests.core.distributed.training FOLDER SCENARIO...

Each process leaves FOLDER/SCENARIO_RANK.pt. Whatever the number of processes, the whole batch is the same.
"""

import gc
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

from sara_core import SaraAdamW
from sara_core.optimizer import averaging, convolution

from .torchrun import leave

BATCH, STEPS, WIDTH = 8, 6, 16


class Net(nn.Module):
    """Layers of several kinds, one of which only some pictures go through."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(WIDTH, 32)
        self.sometimes = nn.Linear(32, 32)
        self.never = nn.Linear(32, 32)
        self.kernel = nn.Conv2d(2, 4, 3, padding=1)
        self.last = nn.Linear(128, 4)

    def forward(self, x, through_all=True):
        x = self.first(x).tanh()
        if through_all:
            x = x + self.sometimes(x)
        x = self.kernel(x.view(-1, 2, 4, 4))
        return self.last(torch.cat([x.flatten(1), x.flatten(1).square()], 1))


def place():
    """Rank and number of processes."""
    if dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def coarse():
    """A model of which many weights are equal, and many zero."""
    net = Net()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(16).round_().div_(16)
    return net


def train(
    passes=1, scaler=None, max_norm=0.0, spike_at=None, some=False, idle=False, held=False,
    make=Net, wrap=lambda net: net, divide=lambda net: net, parts=False, as_if=1, start=0, state=None, steps=STEPS, **options
):  # fmt: skip
    """Train on this process's share of each batch; returns the optimizer and what was seen.

    Args:
        passes: Of accumulation.
        scaler: Whether losses are scaled, as in fp16.
        max_norm: Gradients are clipped by the script.
        spike_at: Step in which the last process's loss is infinite.
        some: Only the first quarter of a batch goes through all layers.
        idle: The last process makes no pass in step 2.
        held: The script says itself which pass is the last.
        make: Makes the model.
        wrap: What is called instead of the model, made of it.
        divide: Divides the model over processes, before the optimizer is made.
        parts: The gradient of the kernel is made in parts.
        as_if: Do by accumulation what so many processes do, in one.
        start: Step to begin with, from `state`.
        steps: To make in all.
    """
    rank, size = place()
    torch.manual_seed(0)
    net = divide(make())
    convolution.PART_ON_CPU = 32 if parts else 1 << 20
    options = {"fraction": 0.3, "lr": 1e-2, "low_rank_weight": 0.0, **options}
    optimizer = SaraAdamW(net, **options)
    model = wrap(net)
    scaler = torch.amp.GradScaler("cpu", 4.0, growth_interval=2) if scaler else None
    if state is not None:
        optimizer.load_state_dict(state)
    stages, turns = [], [(n, r) for n in range(passes) for r in range(as_if)]
    for step in range(start, steps):
        for number, turn in turns:
            if as_if > 1:
                rank, size = turn, as_if
            generator = torch.Generator().manual_seed(100 * step + number)
            x = torch.randn(BATCH, WIDTH, generator=generator)
            y = torch.randn(BATCH, 4, generator=generator)
            mine = slice(rank * BATCH // size, (rank + 1) * BATCH // size)
            if idle and step == 2:  # the first half of the processes have all that is trained on
                x[BATCH // 2 :], y[BATCH // 2 :] = 0, net(torch.zeros(1, WIDTH)).detach()
                if size > 1 and rank >= size // 2:
                    continue
            loss = (model(x[mine], not some or rank * 4 < size) - y[mine]).square().mean() / len(
                turns
            )
            if spike_at == step and rank == size - 1:
                loss = loss * float("inf")
            scaled = loss if scaler is None else scaler.scale(loss)
            if held and number < passes - 1:
                with optimizer.no_sync():
                    scaled.backward()
            else:
                scaled.backward()
        if max_norm:
            nn.utils.clip_grad_norm_(optimizer.parameters(), max_norm)
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
        stages.append(optimizer.num_trainable)
        optimizer.zero_grad()
    return optimizer, {
        "entries": {n: (e.index, e.values) for n, e in optimizer.delta().entries.items()},
        "stages": stages,
        "scale": scaler.get_scale() if scaler else None,
        "steps": optimizer.num_steps,
        "state": optimizer.state_dict(),
    }


class Again(Net):
    """Goes through a layer twice, each time made again in backward: its gradient comes in two pieces."""

    def __init__(self):
        super().__init__()
        del self.never  # a bucket without gradients would hold back those after it

    def forward(self, x, through_all=True):
        x = self.first(x).tanh()
        for _ in range(2 if through_all else 1):
            x = x + checkpoint(self.sometimes, x, use_reentrant=True)
        x = self.kernel(x.view(-1, 2, 4, 4)).flatten(1)
        return self.last(torch.cat([x, x.square()], 1))


class Nested(Net):
    """Has all of its layers made again in backward, within passes of their own."""

    def __init__(self):
        super().__init__()
        del self.never

    def forward(self, x, through_all=True):
        x = checkpoint(self.first, x.requires_grad_(), use_reentrant=True).tanh()
        x = x + checkpoint(self.sometimes, x, use_reentrant=True)
        x = checkpoint(self.kernel, x.view(-1, 2, 4, 4), use_reentrant=True).flatten(1)
        return checkpoint(self.last, torch.cat([x, x.square()], 1), use_reentrant=True)


class Meeting(torch.autograd.Function):
    """Has all processes meet within backward, as synchronised batch norms do."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        if dist.is_initialized():
            dist.all_reduce(torch.ones(3))
        return gradient


class Met(Net):
    """Meets other processes behind a layer that only some pictures go through."""

    def forward(self, x, through_all=True):
        x = self.first(x).tanh()
        if through_all:
            x = x + self.sometimes(x)
        x = self.kernel(Meeting.apply(x).view(-1, 2, 4, 4)).flatten(1)
        return self.last(torch.cat([x, x.square()], 1))


def broken_off():
    """Train after a backward pass that an error has ended."""
    net = Net()
    optimizer = SaraAdamW(net, fraction=0.3, lr=1e-2)

    def fail(gradient):
        raise ArithmeticError("within backward")

    x = net.first(torch.ones(1, WIDTH))
    x.register_hook(fail)
    try:
        net.last(torch.cat([net.kernel(x.view(-1, 2, 4, 4)).flatten(1)] * 2, 1)).sum().backward()
    except ArithmeticError:
        optimizer.zero_grad()
    rank, _ = place()
    net(torch.full((1, WIDTH), float(rank))).sum().backward()
    return {"gradients": [leaf.grad for leaf in optimizer.parameters() if leaf.grad is not None]}


def dropped():
    """Make another optimizer after the first was let go of."""
    net = Net()
    optimizer = SaraAdamW(net, fraction=0.3)
    del optimizer
    gc.collect()
    return {"trained": SaraAdamW(net, fraction=0.3).num_trainable}


def sent(**options):
    """Train, and tell how many bytes each process sent a step, beside how many weights it trained.

    And how many times it did so before the end of a backward pass.
    """
    sizes, early, original, arrived = [], [], dist.all_reduce, averaging.Round.arrived

    def all_reduce(tensor, *args, **kwargs):
        sizes.append(tensor.nbytes)
        return original(tensor, *args, **kwargs)

    def arrived_and_counted(round_, tensor):
        before = len(sizes)
        arrived(round_, tensor)
        early.append(len(sizes) - before)

    dist.all_reduce, averaging.Round.arrived = all_reduce, arrived_and_counted
    try:
        optimizer, found = train(**options)
    finally:
        dist.all_reduce, averaging.Round.arrived = original, arrived
    return found | {"bytes": sizes, "early": sum(early), "trained": optimizer.num_trainable}


def overlapped(**options):
    """Train with buckets so small that most layers have their own, sent while backward goes on."""
    averaging.BUCKET, bucket = 100, averaging.BUCKET
    try:
        return sent(overlap=True, **options)
    finally:
        averaging.BUCKET = bucket


def other_base():
    """The last process has another base."""
    rank, size = place()
    torch.manual_seed(int(rank == size - 1))
    try:
        SaraAdamW(Net(), fraction=0.3, lr=1e-2)
    except ValueError as error:
        return {"error": str(error)}
    return {"error": ""}


def wrapped():
    """Train a model that is wrapped as for a full fine-tuning, before and after SaraAdamW is made."""
    try:
        SaraAdamW(nn.parallel.DistributedDataParallel(Net()), fraction=0.3)
        refused = ""
    except TypeError as error:
        refused = str(error)
    wrappers = []

    def wrap(net):
        wrappers.append(nn.parallel.DistributedDataParallel(net, find_unused_parameters=True))
        return wrappers[0]

    found = train(wrap=wrap)[1]
    (wrapper,) = wrappers
    reduced = [p.numel() for p in wrapper._module_parameters if p.requires_grad]
    return found | {"refused": refused, "reduced": reduced}


SCENARIOS = {
    "plain": dict,
    "low_rank": lambda: {"low_rank_weight": 1e-2, "low_rank_matrices": 2},
    "progressive": lambda: {"progressive_step": 3, "low_rank_weight": 1e-2},
    "clipped": lambda: {"max_grad_norm": 0.05},
    "clipped_outside": lambda: {"max_norm": 0.05},
    "accumulated": lambda: {"passes": 3, "accumulation_steps": 3},
    "accumulated_by_script": lambda: {"passes": 3, "held": True},
    "accumulated_naively": lambda: {"passes": 3},
    "eight_bits": lambda: {"moments": "8bit"},
    "parts": lambda: {"parts": True},
    "scaled": lambda: {"scaler": True, "max_norm": 0.05},
}
ALONE = {  # what one process cannot repeat
    "some": lambda: train(some=True)[1],
    "idle": lambda: train(idle=True)[1],
    "spike": lambda: train(scaler=True, spike_at=3)[1],
    "apart": lambda: train(distributed=False)[1],
    "bfloat16": lambda: sent(communication_dtype=torch.bfloat16),
    "sent": sent,
    "sent_accumulated": lambda: sent(passes=3, accumulation_steps=3),
    "other_base": other_base,
    "wrapped": wrapped,
    "overlapped": overlapped,
    "overlapped_accumulated": lambda: overlapped(passes=3, accumulation_steps=3),
    "overlapped_some": lambda: overlapped(some=True),
    "overlapped_late": lambda: overlapped(make=Again),
    "overlapped_met": lambda: overlapped(make=Met, some=True),
    "nested": lambda: sent(make=Nested, passes=2, accumulation_steps=2),
    "broken_off": broken_off,
    "dropped": dropped,
    "overlapped_late_in_some": lambda: overlapped(make=Again, some=True),
}


def resumed(path):
    """Go on with two steps from what another number of processes has left."""
    state = torch.load(path, weights_only=True) if path.is_file() else None
    start = 0 if state is None else state["sara"]["num_steps"]
    options = {"progressive_step": 3, "low_rank_weight": 1e-2}
    return train(start=start, state=state, steps=start + 2, **options)[1]


def run(name, folder="."):
    """Run a scenario; returns what was seen."""
    if name == "resumed":
        return resumed(Path(folder, "resume.pt"))
    return ALONE[name]() if name in ALONE else train(**SCENARIOS[name]())[1]


def main(folder, *names):
    leave(lambda name: run(name, folder), folder, names or (*SCENARIOS, *ALONE))


if __name__ == "__main__":
    main(*sys.argv[1:])
