"""Starts a script in several processes, as people do, and compares what they left."""

import gc
import subprocess
import sys
from pathlib import Path

import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parents[3]


def torchrun(script, count, folder, names):
    """Run a script's scenarios in so many processes; returns what each has left, by scenario."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", count,
        "-m", f"tests.core.distributed.{Path(script.__file__).stem}", folder, *names,
    ]  # fmt: skip
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, timeout=600, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return {
        name: [torch.load(folder / f"{name}_{rank}.pt", weights_only=True) for rank in range(count)]
        for name in names
    }


def leave(run, folder, names):
    """Be one of the processes: run scenarios by name, and leave what each returns."""
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    for name in names:
        torch.save(run(name), Path(folder, f"{name}_{dist.get_rank()}.pt"))
    gc.collect()  # a wrapper must not outlive its group, nor a process leave others in the lurch
    dist.barrier()
    dist.destroy_process_group()


def flat(found):
    """All learned values in one."""
    return torch.cat([values for _, values in found["entries"].values()])


def assert_same_bits(ranks):
    """All processes have learned the same, to the bit."""
    for other in ranks[1:]:
        assert other["entries"].keys() == ranks[0]["entries"].keys()
        for name, entry in ranks[0]["entries"].items():
            assert all(map(torch.equal, entry, other["entries"][name])), name
