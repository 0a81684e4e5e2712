"""Weights that wait in main memory train another device, made in Python, as if they were there."""

import pytest

from ..helpers import on_second_device

FORMS = ("float32", "float16", "float8_e4m3fn", "scaled float8")


@pytest.fixture(scope="module")
def results():
    return on_second_device("tests.core.optimizer.on_second_device")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("case", "place"),
    [
        ("trained there", "far:0"),
        ("trained in main memory", "cpu"),
        ("half of the weights stay there", "far:0"),
        ("clipped, with decay", "cpu"),
        ("moments in eight bits", "cpu"),
        ("checkpointed", "far:0"),
    ],
)
def test_what_is_learned_is_what_is_learned_without(results, form, case, place):
    found = results[f"{form}, {case}"]
    assert found["same positions"]
    assert found["difference"] <= 1e-5 * found["largest"]  # of the low-rank term's two ways
    assert found["largest"] > 0.01
    assert found["places"] == [place]
    assert found["stays"]


@pytest.mark.parametrize("form", FORMS)
def test_weights_that_stay_on_the_device_are_not_sent(results, form):
    without, half = (
        results[f"{form}, {case}"] for case in ("trained there", "half of the weights stay there")
    )
    assert without["held"] == without["kept"] == 0
    assert half["held"] == half["kept"]
    assert 0.35 * half["stored"] < half["kept"] <= 0.5 * half["stored"]
    passes = 2 * 4  # forward and backward of four steps
    assert without["sent"] - half["sent"] >= 0.9 * passes * half["kept"]


@pytest.mark.parametrize("form", FORMS)
def test_recomputing_sends_weights_once_more(results, form):
    plain, checkpointed = (results[f"{form}, {case}"] for case in ("trained there", "checkpointed"))
    again = 4 * plain["first layers"]  # in four steps; the second of a block need not be
    assert checkpointed["sent"] - plain["sent"] == again
