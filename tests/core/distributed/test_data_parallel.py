"""Data-parallel training under torchrun: the same as in one process, and only what trains is sent."""

import pytest
import torch
import torch.distributed as dist

from . import training
from .torchrun import assert_same_bits, flat, torchrun

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_available(), reason="torch without torch.distributed"),
]


@pytest.fixture(scope="module", params=[2, 4])
def left(request, tmp_path_factory):
    names = (*training.SCENARIOS, *training.ALONE)
    return torchrun(training, request.param, tmp_path_factory.mktemp("ranks"), names)


def assert_close(found, expected):
    """Equal to rounding; Adam takes tiny gradients at full size, so single values may differ more."""
    assert found["stages"] == expected["stages"]
    assert found["scale"] == expected["scale"]
    for name, (index, _) in expected["entries"].items():
        assert torch.equal(found["entries"][name][0], index)
    assert flat(expected).abs().max() > 0.01
    torch.testing.assert_close(flat(found), flat(expected), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", training.SCENARIOS)
def test_processes_learn_what_one_does(left, name):
    assert_same_bits(left[name])
    assert_close(left[name][0], training.run(name))


def test_the_second_stage_left_something_out(left):
    assert left["progressive"][0]["stages"][-1] < left["progressive"][0]["stages"][0]


def test_weights_without_gradient_in_some_processes_count_as_zero_there(left):
    ranks = left["some"]
    assert_same_bits(ranks)
    assert_close(ranks[0], training.train(some=True, as_if=len(ranks))[1])
    never = ranks[0]["entries"]["never.weight"][1]
    assert torch.equal(never, torch.zeros_like(never))


def test_a_process_may_have_no_pass_to_make(left):
    ranks = left["idle"]
    assert_same_bits(ranks)
    assert_close(ranks[0], training.train(idle=True, as_if=2)[1])


def test_a_step_that_is_not_finite_in_one_process_is_skipped_in_all(left):
    ranks = left["spike"]
    assert_same_bits(ranks)
    assert len({(found["scale"], *found["stages"]) for found in ranks}) == 1
    assert [found["steps"] for found in ranks] == [training.STEPS - 1] * len(ranks)
    assert ranks[0]["scale"] == 4.0 * 2 * 0.5 * 2  # grown after two steps, halved, grown after two


@pytest.mark.parametrize(("name", "size"), [("sent", 4), ("sent_accumulated", 4), ("bfloat16", 2)])
def test_only_what_trains_is_sent_once_a_step(left, name, size):
    for found in left[name]:
        assert len(found["bytes"]) == training.STEPS
        flags = len(found["entries"])
        assert found["bytes"] == [size * (found["trained"] + flags)] * training.STEPS
    assert_same_bits(left[name])
    if name == "bfloat16":
        exact = flat(training.run("plain"))
        assert 0 < (flat(left[name][0]) - exact).norm() < 0.02 * exact.norm()


@pytest.mark.parametrize(
    (
        "name",
        "options",
        "early",
        "in_all",
    ),  # sent a step; of five buckets one without gradients holds others up
    [
        ("overlapped", {}, 2, 5),
        ("overlapped_accumulated", {"passes": 3}, 2, 5),
        ("overlapped_some", {"some": True}, 2, 5),
        ("overlapped_late", {"make": training.Again}, 3, 4 + 4),
        ("overlapped_late_in_some", {"make": training.Again, "some": True}, 3, 4 + 4),
    ],
)
def test_gradients_sent_while_backward_goes_on_are_averaged_all_the_same(
    left, name, options, early, in_all
):
    ranks = left[name]
    assert_same_bits(ranks)
    as_if = len(ranks) if options.get("some") else 1
    assert_close(ranks[0], training.train(as_if=as_if, **options)[1])
    for found in ranks:
        assert found["early"] == early * training.STEPS
        assert len(found["bytes"]) == in_all * training.STEPS


def test_other_meetings_of_processes_within_backward_do_not_get_in_the_way(left):
    ranks = left["overlapped_met"]
    assert_same_bits(ranks)
    assert_close(ranks[0], training.train(make=training.Met, some=True, as_if=len(ranks))[1])


def test_passes_within_a_pass_are_none_of_their_own(left):
    assert_same_bits(left["nested"])
    assert_close(left["nested"][0], training.train(make=training.Nested, passes=2)[1])
    assert {len(found["bytes"]) for found in left["nested"]} == {training.STEPS}


def test_gradients_are_averaged_after_a_pass_that_was_broken_off(left):
    first, *others = [found["gradients"] for found in left["broken_off"]]
    assert len(first) == 4
    for other in others:
        assert all(map(torch.equal, first, other))


def test_an_optimizer_that_was_let_go_of_lets_the_model_be(left):
    assert {found["trained"] for found in left["dropped"]} == {left["plain"][0]["stages"][0]}


def test_processes_train_apart_if_asked_to(left):
    first, second, *_ = left["apart"]
    assert not torch.equal(flat(first), flat(second))


def test_another_base_in_one_process_is_refused_in_all(left):
    ranks = left["other_base"]
    for found in ranks:
        assert f"rank {len(ranks) - 1} has base" in found["error"]
        assert "rank 1 has" not in found["error"] or len(ranks) == 2


def test_a_wrapper_made_after_it_reduces_next_to_nothing(left):
    for found in left["wrapped"]:
        assert "give SaraAdamW the model itself" in found["refused"]
        assert found["reduced"] == [4]  # the last bias
    assert_same_bits(left["wrapped"])
    assert_close(left["wrapped"][0], training.run("plain"))


def test_a_run_goes_on_in_another_number_of_processes(tmp_path):
    for count in (2, 4, 1):
        found = torchrun(training, count, tmp_path, ["resumed"])["resumed"]
        assert_same_bits(found)
        torch.save(found[0]["state"], tmp_path / "resume.pt")
    options = {"progressive_step": 3, "low_rank_weight": 1e-2}
    straight = training.train(**options)[1]
    assert found[0]["steps"] == training.STEPS
    torch.testing.assert_close(flat(found[0]), flat(straight), rtol=0, atol=1e-5)
