"""What memory a run will need, against bytes worked out by hand and against a process's own peak."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from sara_core import SaraAdamW
from sara_core.training.config import TrainConfig
from sara_core.training.memory_need import LiveBytes, MemoryNeed, most_bytes
from sara_core.training.trainer import TrainingRun

from .test_training import Task, run

ROOT = Path(__file__).resolve().parents[3]


def test_live_bytes_by_hand():
    there, weight = torch.randn(1000), nn.Parameter(torch.randn(1000))
    with LiveBytes(there.device) as live:
        there.view(10, 100).add_(1)
        assert live.now == 0
        doubled = there * 2
        part = doubled.view(10, 100)[3:]
        assert live.now == 4000
        del doubled
        assert live.now == 4000  # the view holds on to it
        del part
        assert live.now == 0
        loss = (weight * (there * 2)).sum()
        assert live.now == 4000 + 4  # what backward needs, and the loss
        loss.backward()
        assert live.now == 4000 + 4  # the gradient
        assert live.peak == 8000 + 8  # the gradient of the loss, too
    assert (there * 2).shape == (1000,)
    assert live.peak == 8000 + 8  # the gradient of the loss, too


def test_tensors_elsewhere_do_not_count():
    with LiveBytes(torch.device("meta")) as live:
        torch.randn(100)
        held = torch.empty(50, device="meta")
        assert live.now == held.nbytes == 200


def test_a_rehearsal_leaves_no_trace():
    torch.manual_seed(0)
    net = nn.Linear(6, 6)
    optimizer = SaraAdamW(net, fraction=0.5, lr=1e-2, low_rank_weight=0)
    training = TrainingRun(optimizer, Task(net), TrainConfig(steps=6, batch_size=2))
    assert 0 < training.rehearse(1) < training.rehearse(5)
    assert all(leaf.grad is None for leaf in optimizer.parameters())
    expected, _, reports = run()
    assert [report.loss for report in training] == [report.loss for report in reports]
    assert torch.equal(net.weight, expected.weight)


def test_what_would_fit():
    need = MemoryNeed(base=100, trained=50, activations=80, picture=18, free=200, batch_size=4)
    assert (need.total, need.fits) == (230, False)
    assert need.largest_batch() == 2  # 230 - 2 * 18 = 194
    assert need.with_batch(2).total == 194
    assert need.with_batch(2).fits
    assert need.largest_area() == pytest.approx(50 / 80)
    roomy = MemoryNeed(100, 50, 50, 18, 200, 4)
    assert (roomy.fits, roomy.largest_batch(), roomy.largest_area()) == (True, 4, 1.0)
    hopeless = MemoryNeed(100, 150, 80, 1, 200, 4)
    assert (hopeless.largest_batch(), hopeless.largest_area()) == (0, 0.0)


class Allocator:
    """That of a device, of which kernels have taken 512 bytes for themselves."""

    def __init__(self):
        self.is_reset = False

    def reset_peak_memory_stats(self, device):
        self.is_reset = True

    def memory_allocated(self, device):
        assert self.is_reset
        return 10_000

    def max_memory_allocated(self, device):
        return 10_000 + 400 + 512


def test_what_kernels_take_for_themselves_counts_where_the_allocator_tells_of_it():
    cpu, make = torch.device("cpu"), lambda: torch.zeros(100)
    assert most_bytes(cpu, make) == 400
    assert most_bytes(cpu, make, Allocator()) == 912
    assert most_bytes(cpu, lambda: torch.zeros(1000), Allocator()) == 4000


PEAKS = """
import sys
import torch
from torch import nn
from sara_core import SaraAdamW
from sara_core.training.config import TrainConfig
from sara_core.training.gradient_checkpointing import checkpointed
from sara_core.training.objective import NoiseSchedule
from sara_core.training.trainer import TrainingRun

def memory(key):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(key)) * 1024

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(512, 1024), nn.GELU(), nn.Linear(1024, 512))
    def forward(self, x):
        return x + self.layers(x)

class Task:
    keys, training, regularisation, validation = [0] * 8, range(8), (), ()
    schedule = NoiseSchedule("flow", "uniform", lambda t: 0.1 + 0.8 * t)
    def mask(self, pictures):
        return None
    def longest_caption(self, picture):
        return 0

    def captions_to_learn(self, picture):
        return range(1)
    def latents(self, pictures):
        return torch.ones(len(pictures), 1000, 512)
    def predict(self, noisy, sigma, pictures, captions):
        return net(noisy)

torch.manual_seed(0)
batch, is_checkpointed = int(sys.argv[1]), sys.argv[2] == "checkpointed"
net = nn.Sequential(*[Block() for _ in range(4)])
optimizer = SaraAdamW(net, fraction=0.1, lr=1e-3)
training = TrainingRun(optimizer, Task(), TrainConfig(steps=3, batch_size=batch))
with checkpointed(net, is_checkpointed):
    next(iter(training))
    expected = training.rehearse(batch)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before = memory("VmRSS")
    list(training)
print(expected, memory("VmHWM") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the process's peak from /proc")
@pytest.mark.parametrize("kind", ["plain", "checkpointed"])
def test_a_rehearsal_foretells_the_peak_of_steps(kind):
    done = subprocess.run(
        [sys.executable, "-c", PEAKS, "4", kind], cwd=ROOT, capture_output=True, text=True,
        check=True, env={"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    expected, found = map(int, done.stdout.split())
    assert found == pytest.approx(expected, rel=0.05)
