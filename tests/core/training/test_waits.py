"""What a step waits for, on a device made in Python."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils import backend_registration

ROOT = Path(__file__).resolve().parents[3]
LAYERS, MICRO_BATCHES = 2, 2


@pytest.fixture(scope="module")
def waits():
    if not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"):
        pytest.skip("this torch takes no devices made in Python")
    command = [sys.executable, "-m", "tests.core.training.waiting_steps"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("case", ["on the device", "weights in main memory"])
def test_a_step_waits_once(waits, case):
    assert waits[case] == [{"tolist": 1}] * len(waits[case])


def test_what_is_trained_in_main_memory_has_its_gradients_come_there(waits):
    of_gradients = LAYERS * MICRO_BATCHES + 1  # and of the low-rank term
    expected = {"tolist": 1, "copy to main memory": of_gradients}
    found = waits["trained in main memory"]
    assert found == [expected] * len(found)
