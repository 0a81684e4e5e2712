"""The loop of diffusers' examples, with accelerate, a diffusers UNet and SaraAdamW in place of AdamW."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from ...harness.environment import install_peers

SCRIPT = Path(__file__).with_name("diffusers_training.py")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_available(), reason="torch without torch.distributed"),
    pytest.mark.skipif("SARA_CACHE" not in os.environ, reason="run python dev.py test"),
]


def run(count, folder, steps):
    """Train in so many processes; returns what each has learned, by parameter."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", count,
        SCRIPT, folder, steps,
    ]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(install_peers()), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"delta_{n}.pt", weights_only=True) for n in range(count)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one process learns in eight steps."""
    (delta,) = run(1, tmp_path_factory.mktemp("alone"), 8)
    assert max(float(values.abs().max()) for _, values in delta.values()) > 1e-3
    return delta


@pytest.mark.parametrize("count", [1, 2])
def test_the_loop_of_diffusers_learns_the_same_on_any_number_and_goes_on_from_its_checkpoint(
    alone, tmp_path, count
):
    run(count, tmp_path, 4)
    first, *others = run(count, tmp_path, 8)
    for name, (index, values) in alone.items():
        assert torch.equal(first[name][0], index)
        tolerance = 0 if count == 1 else 1e-5
        torch.testing.assert_close(first[name][1], values, rtol=0, atol=tolerance)
        assert all(torch.equal(other[name][1], first[name][1]) for other in others)
