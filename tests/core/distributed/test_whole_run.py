"""`TrainingRun` in several processes: the same as in one, whatever happens to one of them."""

import pytest
import torch
import torch.distributed as dist

from . import whole_run
from .torchrun import assert_same_bits, flat, torchrun

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_available(), reason="torch without torch.distributed"),
]


@pytest.fixture(scope="module", params=[2, 4])
def left(request, tmp_path_factory):
    """What each process left; with four, some have no picture of the small bucket."""
    folder = tmp_path_factory.mktemp("ranks")
    return torchrun(whole_run, request.param, folder, whole_run.SCENARIOS)


def assert_close(found, expected):
    assert flat(expected).abs().max() > 0.01
    torch.testing.assert_close(flat(found), flat(expected), rtol=0, atol=1e-5)
    for (loss, *others), (expected_loss, *expected_others) in zip(
        found["losses"], expected["losses"], strict=True
    ):
        assert others == expected_others
        assert loss == pytest.approx(expected_loss, rel=1e-5)


@pytest.mark.parametrize("name", ["plain", "scaled"])
def test_processes_learn_what_one_does_with_the_whole_batch(left, name):
    assert_same_bits(left[name])
    expected = whole_run.SCENARIOS[name](None)
    for found in left[name]:
        assert_close(found, expected)


@pytest.mark.parametrize("name", ["chosen", "chosen_to_keep", "chosen_in_parts"])
def test_processes_choose_by_gradient_what_one_does(left, name):
    assert_same_bits(left[name])
    expected = whole_run.chosen(keeps=name == "chosen_to_keep")
    for found in left[name]:
        assert found["parts"] == (2 if name == "chosen_in_parts" else 1)
        assert_close(found, expected)
        for key, (index, _) in expected["entries"].items():
            assert torch.equal(found["entries"][key][0], index)


def test_an_error_in_one_ends_all_after_the_same_step(left):
    *others, failed = left["error"]
    assert failed["error"] == "RuntimeError: the disk is on fire"
    for found in others:
        assert f"rank {len(others)}: RuntimeError: the disk is on fire" in found["error"]
    assert {found["step"] for found in left["error"]} == {3}
    assert_same_bits(left["error"])
    assert_close(failed, whole_run.run(steps=3))


def test_where_memory_runs_out_in_one_all_go_on_in_parts(left):
    assert [found["parts"] for found in left["no_memory"]] == [2] * len(left["no_memory"])
    assert_same_bits(left["no_memory"])
    assert_close(left["no_memory"][0], whole_run.run())


def test_a_step_that_is_not_finite_in_one_is_skipped_in_all(left):
    for found in left["not_finite"]:
        assert [skipped for _, _, skipped in found["losses"]].count(True) == 1
        assert found["losses"][3][2]
    assert_same_bits(left["not_finite"])


def test_where_one_says_that_it_is_enough_all_end_after_the_same_step(left):
    assert {found["step"] for found in left["ended"]} == {5}
    assert {found["error"] for found in left["ended"]} == {""}
    assert_same_bits(left["ended"])
    assert_close(left["ended"][0], whole_run.run(steps=5))
    first = whole_run.run(steps=5)
    for found in left["ended"]:  # the step that was begun and dropped has left no trace
        assert torch.equal(found["state"]["generator"], first["state"]["generator"])


@pytest.mark.parametrize(
    ("scenario", "counts"), [("resumed", (2, 4, 1)), ("resumed_of_three", (4, 2, 1))]
)
def test_a_run_goes_on_in_another_number_of_processes(tmp_path, scenario, counts):
    losses = []
    for count in counts:
        found = torchrun(whole_run, count, tmp_path, [scenario])[scenario]
        assert_same_bits(found)
        losses += found[0]["losses"]
        torch.save(found[0]["state"], tmp_path / "resume.pt")
    assert found[0]["step"] == 12
    assert_close({**found[0], "losses": losses}, whole_run.run())


def test_batches_kept_from_more_processes_are_gone_over_in_passes_that_fit(tmp_path):
    counts = []
    left = torchrun(whole_run, 4, tmp_path, ["resumed_of_three"])["resumed_of_three"][0]
    whole_run.run(state=left["state"], batch=3, fail=counts.append)
    assert max(counts) == 3
