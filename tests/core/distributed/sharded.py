"""The training script of `training`, with the model divided by torch's `fully_shard` (FSDP2).

usage: torchrun --nproc-per-node N -m tests.core.distributed.sharded FOLDER SCENARIO...

Each process leaves FOLDER/SCENARIO_RANK.pt. Whatever the number of processes, the whole batch is the same.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard, distribute_module

from sara_core import SaraAdamW, select_by_gradient
from sara_core.optimizer.updates import clip_
from sara_core.training.config import TrainConfig
from sara_core.training.trainer import TrainingRun

from ..training.small_run import Task
from .torchrun import leave
from .training import BATCH, Net, coarse, train


def divided(net, shape=None, ignored=None, **options):
    """Divide a model over all processes, or over the second dimension of a mesh of this shape."""
    names = ("replicate", "shard")[-len(shape or (1,)) :]
    mesh = init_device_mesh("cpu", shape or (dist.get_world_size(),), mesh_dim_names=names)
    fully_shard(net.first, mesh=mesh, **options)
    fully_shard(net, mesh=mesh, ignored_params=ignored and ignored(net), **options)
    return net


def refused(make):
    """Return the message of the error that making something raises."""
    try:
        make()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    return {"error": ""}


def make_net():
    torch.manual_seed(0)
    return Net()


def first_step(net, optimizer):
    """Make the first step of `train` on a model that is divided."""
    rank, size = dist.get_rank(), dist.get_world_size()
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(BATCH, n, generator=generator) for n in (16, 4))
    mine = slice(rank * BATCH // size, (rank + 1) * BATCH // size)
    (net(x[mine]) - y[mine]).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def held(net):
    """What this process holds of the model's weights."""
    return {name: p.to_local().detach().clone() for name, p in net.named_parameters()}


def by_columns(parameter):
    """Divide matrices along their second dimension."""
    return Shard(1 if parameter.dim() == 2 else 0)


def too_late():
    """Divide the model after the optimizer was made."""
    net = Net()
    optimizer = SaraAdamW(net, fraction=0.3, lr=1e-2)
    first_step(divided(net), optimizer)


def in_part_too_late():
    """Divide a part of the model after the optimizer was made."""
    net = Net()
    optimizer = SaraAdamW(net, fraction=0.3, lr=1e-2)
    fully_shard(net.first)
    first_step(net, optimizer)


def of_a_part():
    """Train a part of what was divided as a whole."""
    container = torch.nn.Sequential(Net())
    fully_shard(container)
    SaraAdamW(container[0], fraction=0.3)


def without_fully_shard():
    """Train weights that are divided, or held by all, in another way."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    net = distribute_module(Net(), mesh)
    SaraAdamW(net, fraction=0.3)


def infinite():
    """Clip gradients of which one is infinite, where the model is divided in part."""
    net = divided(make_net(), ignored=lambda net: {net.kernel.weight})
    optimizer = SaraAdamW(net, fraction=0.3, lr=1e-2)
    leaves = optimizer.parameters()
    for leaf in leaves:
        leaf.grad = torch.ones_like(leaf)
    part = leaves[0].grad.to_local()
    part[: dist.get_rank() == 0] = float("inf")
    clip_(leaves, 1.0)
    parts = [leaf.grad.to_local() if hasattr(leaf, "device_mesh") else leaf.grad for leaf in leaves]
    return {"nan": [int(part.isnan().sum()) for part in parts]}


def there_and_back():
    """Look at the model at several strengths, apply the delta elsewhere, and restore the base."""
    net = divided(Net())
    base, x = held(net), torch.ones(1, 16)
    optimizer = SaraAdamW(net, fraction=0.3, lr=1e-2)
    with torch.no_grad():
        before = net(x)
    first_step(net, optimizer)
    with torch.no_grad():
        after = net(x)
        with optimizer.at_strength(0.0):
            at_zero = net(x)
        again = net(x)
    delta = optimizer.delta()
    optimizer.restore()
    restored = all(torch.equal(base[name], part) for name, part in held(net).items())
    with torch.no_grad():
        undo = delta.apply_to(net)
        applied = net(x)
        undo()
    undone = all(torch.equal(base[name], part) for name, part in held(net).items())
    outputs = {
        "before": before,
        "after": after,
        "zero": at_zero,
        "again": again,
        "applied": applied,
    }
    return {"restored": restored, "undone": undone, **outputs}


def continued():
    """Go on from a delta, and try what was learned on another base."""
    net = divided(make_net())
    optimizer = SaraAdamW(net, fraction=0.3, lr=1e-2)
    first_step(net, optimizer)
    learned, delta, state = held(net), optimizer.delta(), optimizer.state_dict()
    optimizer.restore()
    optimizer = SaraAdamW(net, fraction=0.3)
    optimizer.start_from(delta, 1)
    same = all(
        torch.allclose(learned[name], part, rtol=0, atol=1e-7) for name, part in held(net).items()
    )
    optimizer.restore()
    before = held(net)
    few = SaraAdamW(net, fraction=0.1)
    outside = refused(lambda: few.start_from(delta))["error"]
    unchanged = all(torch.equal(before[name], part) for name, part in held(net).items())
    other_net = make_net()
    with torch.no_grad():  # the larger ones, so that the same are selected
        for weight in other_net.parameters():
            weight[weight.abs() >= optimizer.threshold] *= 1.5
    other = SaraAdamW(divided(other_net), fraction=0.3)
    return {
        "same": same,
        "unchanged": unchanged,
        "outside": outside,
        "other": refused(lambda: other.start_from(delta))["error"],
        "state": refused(lambda: other.load_state_dict(state))["error"],
    }


def by_gradient(divide):
    """Choose weights by gradient, beside what is kept or not, and make a step with them."""
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    mine = slice(rank * BATCH // size, (rank + 1) * BATCH // size)
    found = {}
    for keeps, by_parameter in ((False, True), (True, True), (False, False)):
        net = make_net()
        divide(net)

        def go_over(seed, net=net):
            generator = torch.Generator().manual_seed(seed)
            for _ in range(3):
                x, y = (torch.randn(BATCH, n, generator=generator) for n in (16, 4))
                (net(x[mine]) - y[mine]).square().mean().backward()

        keep = (lambda: go_over(2)) if keeps else None  # noqa: B023
        selection = select_by_gradient(
            net,
            lambda: go_over(1),
            keep,
            fraction=0.3,
            by_parameter=by_parameter,  # noqa: B023
        )
        optimizer = SaraAdamW(net, selection=selection)
        optimizer.param_groups[0]["lr"] *= 300
        go_over(3)
        optimizer.step()
        entries = {n: (e.index, e.values) for n, e in optimizer.delta().entries.items()}
        found[keeps, by_parameter] = {"entries": entries}
        optimizer.restore()
    return found


def whole_loop(divide):
    """Train by the loop that SaRA Train uses, with a picture for each process in every pass."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(9, 40), torch.nn.Tanh(), torch.nn.Linear(40, 8))
    divide(net)
    optimizer = SaraAdamW(net, fraction=0.5, lr=1e-2, low_rank_weight=1e-2, seed=3)
    config = TrainConfig(steps=4, batch_size=4, seed=11)
    task = Task(net)
    task.training = range(4)  # of one size
    reports = list(TrainingRun(optimizer, task, config))
    entries = {n: (e.index, e.values) for n, e in optimizer.delta().entries.items()}
    return {"entries": entries, "losses": [report.loss for report in reports]}


def half_precision():
    """Make a step with weights of float32 that are computed with in bfloat16."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    mixed = divided(make_net(), mp_policy=policy)
    optimizer = SaraAdamW(mixed, fraction=0.3, lr=1e-2)
    first_step(mixed, optimizer)
    return {"entries": {n: (e.index, e.values) for n, e in optimizer.delta().entries.items()}}


def saved(folder, steps, **options):
    """Go on with two steps from what torch.distributed.checkpoint has written in any number of processes."""
    checkpoint, whole = Path(folder, "checkpoint"), Path(folder, "whole.pt")
    state = None
    if checkpoint.is_dir():
        if dist.get_rank() == 0:
            dcp_to_torch_save(checkpoint, whole)
        dist.barrier()
        state = torch.load(whole, weights_only=True)["optimizer"]
    start = 0 if state is None else state["sara"]["num_steps"]
    optimizer, found = train(
        divide=divided, start=start, state=state, steps=start + steps, **options
    )
    dcp.save({"optimizer": optimizer.state_dict()}, checkpoint_id=checkpoint)
    return found


RUN = {"progressive_step": 3, "low_rank_weight": 1e-2}
SCENARIOS = {
    "plain": dict,
    "low_rank": lambda: {"low_rank_weight": 1e-2, "low_rank_matrices": 2},
    "progressive": lambda: RUN,
    "by_threshold": lambda: {"fraction": None, "threshold": 0.05},
    "by_number": lambda: {"fraction": None, "num_trainable": 700, "biases_and_norms": True},
    "of_the_model": lambda: {"by_parameter": False},
    "equal": lambda: {"make": coarse},
    "equal_in_the_model": lambda: {"make": coarse, "by_parameter": False},
    "some_of_the_zeros": lambda: {"make": coarse, "zeros": "train", "fraction": 0.1},
    "clipped": lambda: {"max_grad_norm": 0.05},
    "clipped_outside": lambda: {"max_norm": 0.05},
    "accumulated": lambda: {"passes": 3},
    "scaled": lambda: {"scaler": True, "max_norm": 0.05},
    "decayed": lambda: {"weight_decay": 0.1},
}
DIVISIONS = {
    "groups": {"divide": lambda net: divided(net, (2, dist.get_world_size() // 2))},
    "some_undivided": {
        "divide": lambda net: divided(
            net, ignored=lambda net: {net.kernel.weight, net.last.weight}
        ),
        "max_grad_norm": 0.05,
    },
}
ALONE = {
    "eight_bits": lambda folder: train(divide=divided, moments="8bit")[1],
    "spike": lambda folder: train(divide=divided, scaler=True, spike_at=3)[1],
    "there_and_back": lambda folder: there_and_back(),
    "continued": lambda folder: continued(),
    "whole_loop": lambda folder: whole_loop(fully_shard),
    "by_gradient": lambda folder: by_gradient(divided),
    "by_gradient_some_undivided": lambda folder: by_gradient(
        lambda net: divided(net, ignored=lambda net: {net.kernel.weight, net.last.weight})
    ),
    "half_precision": lambda folder: half_precision(),
    "by_columns": lambda folder: refused(
        lambda: SaraAdamW(divided(Net(), shard_placement_fn=by_columns), 0.1)
    ),
    "too_late": lambda folder: refused(too_late),
    "in_part_too_late": lambda folder: refused(in_part_too_late),
    "of_a_part": lambda folder: refused(of_a_part),
    "without_fully_shard": lambda folder: refused(without_fully_shard),
    "infinite": lambda folder: infinite(),
    "saved": lambda folder: saved(folder, 2, **RUN),
}


def run(name, folder):
    """Run a scenario; returns what was seen."""
    if name in ALONE:
        return ALONE[name](folder)
    if name in DIVISIONS:
        return train(**DIVISIONS[name])[1]
    return train(divide=divided, **SCENARIOS[name]())[1]


def main(folder, *names):
    leave(lambda name: run(name, folder), folder, names or (*SCENARIOS, *DIVISIONS, *ALONE))


if __name__ == "__main__":
    main(*sys.argv[1:])
