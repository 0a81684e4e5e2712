"""What two processes that train together send each other, and what that costs: SaRA beside dense and LoRA.

Run by `python dev.py bench --processes`, or `--processes --full` for SD1.5's UNet at its real size. Each
method has two processes of its own, on this machine, with gloo. What is sent is what the processes give to
all-reduce; what it costs is the difference between passes that send and passes that do not, which take turns.
With `--out` the rows are added to those of an earlier `python dev.py bench`.
"""

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
METHODS = ("sara", "sara-overlap", "sara-bfloat16", "ddp-lora", "ddp-dense")
SIDE = 16  # of the latents; small, so that sending is not hidden behind the processor
STEPS, WARM_UP = 5, 1


class Sent:
    """Counts the bytes given to all-reduce, by SaRA or by DistributedDataParallel."""

    def __init__(self):
        self.bytes = 0

    def count_calls(self):
        import torch.distributed as dist

        all_reduce = dist.all_reduce

        def counting(tensor, *args, **kwargs):
            self.bytes += tensor.nbytes
            return all_reduce(tensor, *args, **kwargs)

        dist.all_reduce = counting

    def count_buckets(self, wrapped):
        from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

        def hook(state, bucket):
            self.bytes += bucket.buffer().nbytes
            return allreduce_hook(state, bucket)

        wrapped.register_comm_hook(None, hook)


def prepared(method, net, sent):
    """Return the model to call, the number of trained values, and a context in which nothing is sent."""
    import torch
    from torch.nn.parallel import DistributedDataParallel

    from .method import peft_lora

    if method.startswith("sara"):
        from sara_core import SaraAdamW

        sent.count_calls()
        half = torch.bfloat16 if method.endswith("bfloat16") else None
        overlap = method.endswith("overlap")
        optimizer = SaraAdamW(net, fraction=0.1, lr=1e-4, communication_dtype=half, overlap=overlap)
        return net, optimizer.num_trainable, optimizer.no_sync, optimizer.zero_grad
    trained = sum(p.numel() for p in net.parameters())
    if method == "ddp-lora":
        _, trained = peft_lora(net, {})
    wrapped = DistributedDataParallel(net, gradient_as_bucket_view=True)
    sent.count_buckets(wrapped)
    return wrapped, trained, wrapped.no_sync, lambda: wrapped.zero_grad(set_to_none=False)


def work(method, size):
    """Be one of the two processes; the first prints what was measured."""
    import torch
    import torch.distributed as dist

    from .method import make_unet

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    net, sent = make_unet(size), Sent()
    total = sum(p.numel() for p in net.parameters())
    model, trained, no_sync, clear = prepared(method, net, sent)
    generator = torch.Generator().manual_seed(dist.get_rank())
    noisy, target = torch.randn(2, 1, 4, SIDE, SIDE, generator=generator)
    words = torch.randn(1, 77, 768, generator=generator)
    seconds, each = {True: [], False: []}, 0
    for sends in (True, False) * (WARM_UP + STEPS):
        dist.barrier()
        sent.bytes, started = 0, time.perf_counter()
        with contextlib.nullcontext() if sends else no_sync():
            (model(noisy, torch.full((1,), 500.0), words) - target).square().mean().backward()
        seconds[sends].append(time.perf_counter() - started)
        clear()
        each = sent.bytes or each
    row = {
        "method": method, "processes": dist.get_world_size(), "parameters": total, "trained": trained,
        "sent_bytes": each, "bytes_per_trained": each / trained,
        "pass_seconds": statistics.median(seconds[False][WARM_UP:]),
        "sending_pass_seconds": statistics.median(seconds[True][WARM_UP:]),
    }  # fmt: skip
    if dist.get_rank() == 0:
        print(json.dumps(row), flush=True)
    dist.barrier()
    dist.destroy_process_group()


def measure(method, size):
    """Start the two processes of a method; returns what the first printed."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        "-m", "tests.benchmark.processes", "--work", method, *(["--full"] if size == "full" else []),
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--full", action="store_true", help="SD1.5's UNet at its real size")
    parser.add_argument("--out", type=Path, help="such as docs/benchmark")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    options = parser.parse_args()
    size = "full" if options.full else "quick"
    if options.work:
        work(options.work, size)
        return
    from .report import checks_over_processes, over_processes, write

    rows = [measure(method, size) for method in METHODS]
    print("\n".join(over_processes(rows)))
    for text, holds in checks_over_processes(rows):
        print(f"{'holds' if holds else 'DOES NOT HOLD'}: {text}")
    if options.out:
        data = json.loads(options.out.with_suffix(".json").read_text())
        write({**data, "processes": rows}, options.out)


if __name__ == "__main__":
    main()
