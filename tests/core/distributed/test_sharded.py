"""Models divided by `fully_shard` (FSDP2) train like whole ones, whatever the number of processes."""

import pytest
import torch
import torch.distributed as dist

from . import training
from .torchrun import assert_same_bits, flat, torchrun

if not dist.is_available():
    pytest.skip("torch without torch.distributed", allow_module_level=True)

if not hasattr(pytest.importorskip("torch.distributed.fsdp"), "fully_shard"):
    pytest.skip("torch before 2.6", allow_module_level=True)

from . import sharded  # noqa: E402

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=[2, 4])
def left(request, tmp_path_factory):
    """What each process left; with four, some hold nothing of the smaller weights."""
    names = (*sharded.SCENARIOS, *sharded.DIVISIONS, *sharded.ALONE)
    return torchrun(sharded, request.param, tmp_path_factory.mktemp("ranks"), names)


def assert_close(found, expected, tolerance=1e-5):
    """Equal selection, and values to rounding."""
    assert found["entries"].keys() == expected["entries"].keys()
    for name, (index, _) in expected["entries"].items():
        assert torch.equal(found["entries"][name][0], index), name
        assert found["entries"][name][0].dtype == index.dtype
    assert flat(expected).abs().max() > 0.01
    torch.testing.assert_close(flat(found), flat(expected), rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", sharded.SCENARIOS)
def test_a_divided_model_learns_what_a_whole_one_does(left, name):
    expected = training.train(**sharded.SCENARIOS[name]())[1]
    assert_same_bits(left[name])
    for key in ("stages", "scale", "steps"):
        assert [found[key] for found in left[name]] == [expected[key]] * len(left[name])
    assert_close(left[name][0], expected)


def test_the_training_loop_takes_a_divided_model(left):
    expected = sharded.whole_loop(lambda net: None)
    assert_same_bits(left["whole_loop"])
    for found in left["whole_loop"]:
        assert found["losses"] == pytest.approx(expected["losses"], rel=1e-5)
    assert_close(left["whole_loop"][0], expected)


@pytest.mark.parametrize("keeps", [(False, True), (True, True), (False, False)])
@pytest.mark.parametrize("name", ["by_gradient", "by_gradient_some_undivided"])
def test_the_same_weights_are_chosen_by_gradient(left, name, keeps):
    ranks = [found[keeps] for found in left[name]]
    assert_same_bits(ranks)
    expected = sharded.by_gradient(lambda net: None)[keeps]
    if (
        keeps[0] and name != "by_gradient"
    ):  # squares of undivided weights are of each process's part
        for key, (index, _) in expected["entries"].items():
            found = ranks[0]["entries"][key][0]
            assert len(found) == len(index)
            assert torch.isin(found, index).float().mean() > 0.7
    else:
        assert_close(ranks[0], expected)


def test_moments_in_eight_bits_are_as_exact_as_in_a_whole_model(left):
    """They are scaled in other blocks, which end where a part does."""
    exact = flat(training.train()[1])
    whole = (flat(training.train(moments="8bit")[1]) - exact).norm()
    assert_same_bits(left["eight_bits"])
    assert 0 < (flat(left["eight_bits"][0]) - exact).norm() < 1.2 * whole


@pytest.mark.parametrize("name", sharded.DIVISIONS)
def test_it_may_be_divided_in_groups_of_processes_or_in_part(left, name):
    norm = sharded.DIVISIONS[name].get("max_grad_norm", 0.0)
    assert_same_bits(left[name])
    assert_close(left[name][0], training.train(max_grad_norm=norm)[1])


def test_a_state_fits_a_model_that_is_not_divided(left):
    state = left["progressive"][0]["state"]
    assert {len(record["shape"]) for record in state["sara"]["weights"]} == {2, 4}
    found = training.train(state=state, start=6, steps=8, **sharded.RUN)[1]
    assert_close(found, training.train(steps=8, **sharded.RUN)[1])


def test_a_step_that_is_not_finite_in_one_process_is_skipped_in_all(left):
    ranks = left["spike"]
    assert_same_bits(ranks)
    assert [found["steps"] for found in ranks] == [training.STEPS - 1] * len(ranks)
    assert {found["scale"] for found in ranks} == {4.0 * 2 * 0.5 * 2}


def test_strengths_show_at_once_and_the_base_comes_back_to_the_bit(left):
    for found in left["there_and_back"]:
        assert found["restored"]
        assert found["undone"]
        assert torch.equal(found["zero"], found["before"])
        assert torch.equal(found["again"], found["after"])
        assert not torch.equal(found["after"], found["before"])
        torch.testing.assert_close(found["applied"], found["after"], rtol=0, atol=1e-6)


def test_weights_computed_with_in_bfloat16_learn_in_float32(left):
    expected = training.train(steps=1)[1]
    assert_same_bits(left["half_precision"])
    found = left["half_precision"][0]
    assert found["entries"].keys() == expected["entries"].keys()
    same = (flat(found) - flat(expected)).abs() < 1e-4  # the first step is of the gradient's sign
    assert 0.97 < same.float().mean() < 1


def test_a_delta_is_gone_on_from_and_one_of_another_base_refused_in_all(left):
    for found in left["continued"]:
        assert found["same"]
        assert "ValueError: the delta was trained on another base" in found["other"]
        assert "ValueError: the delta changes " in found["outside"]
        assert "ValueError: the saved state was trained on another base" in found["state"]
        assert found["unchanged"]


def test_other_divisions_and_late_ones_are_refused(left):
    for found in left["by_columns"]:
        assert (
            "ValueError: parameter 'first.weight' is divided over processes by (Shard"
            in found["error"]
        )
    for found in (*left["too_late"], *left["in_part_too_late"]):
        assert "'first.weight' is not the one SaraAdamW was made for" in found["error"]
    for found in (*left["of_a_part"], *left["without_fully_shard"]):
        assert (
            "ValueError: parameter 'first.weight' is a DTensor that fully_shard" in found["error"]
        )


def test_clipping_an_infinite_gradient_ruins_no_other(left):
    assert [sum(found["nan"]) for found in left["infinite"]] == [1] + [0] * (
        len(left["infinite"]) - 1
    )


def test_a_run_goes_on_from_a_distributed_checkpoint_in_another_number_of_processes(tmp_path):
    for count in (2, 4, 1):
        ranks = torchrun(sharded, count, tmp_path, ["saved"])["saved"]
        assert_same_bits(ranks)
    assert ranks[0]["steps"] == training.STEPS
    assert_close(ranks[0], training.train(**sharded.RUN)[1])
