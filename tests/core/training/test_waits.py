"""What a step waits for, on a device made in Python."""

import pytest

from ..helpers import on_second_device

LAYERS, MICRO_BATCHES = 2, 2


@pytest.fixture(scope="module")
def waits():
    return on_second_device("tests.core.training.waiting_steps")


@pytest.mark.parametrize("case", ["on the device", "weights in main memory"])
def test_a_step_waits_once(waits, case):
    assert waits[case] == [{"tolist": 1}] * len(waits[case])


def test_what_is_trained_in_main_memory_has_its_gradients_come_there(waits):
    of_gradients = LAYERS * MICRO_BATCHES + 1  # and of the low-rank term
    expected = {"tolist": 1, "copy to main memory": of_gradients}
    found = waits["trained in main memory"]
    assert found == [expected] * len(found)
