import pytest
import torch

from sara_core.weights.analysis import Tally, analyze, block_of
from sara_core.weights.selection import select


def weights():
    torch.manual_seed(0)
    return {
        "blocks.0.attn.weight": torch.randn(300, 200) * 0.02,
        "blocks.0.conv.weight": torch.randn(40, 20, 3, 3) * 0.5,
        "blocks.1.attn.weight": torch.randn(100, 100) * 0.01,
        "out.weight": torch.cat([torch.zeros(50, 40), torch.ones(50, 40)]),
    }


def test_counts_by_block_and_kind_add_up_to_the_selection():
    found = analyze(weights(), threshold=0.005, zeros="train")
    expected = {n: int((w.abs() < 0.005).sum()) for n, w in weights().items()}
    assert found.total == Tally(81_200, sum(expected.values()), 2000)
    assert list(found.blocks) == ["blocks.0", "blocks.1", "out"]
    assert found.blocks["blocks.0"].num_selected == (
        expected["blocks.0.attn.weight"] + expected["blocks.0.conv.weight"]
    )
    assert found.blocks["out"] == Tally(4000, 2000, 2000)
    assert found.kinds["conv2d"] == Tally(7200, expected["blocks.0.conv.weight"], 0)
    assert (
        found.total.num_selected == select(weights(), threshold=0.005, zeros="train").num_selected
    )


def test_skipped_zeros_are_not_counted_as_selected():
    found = analyze(weights(), threshold=1e-5)
    assert found.cutoff.skip_zeros
    assert found.blocks["out"].num_selected == 0


def test_suggestions_are_near_the_exact_thresholds():
    found = analyze(weights(), fraction=0.1)
    assert found.cutoff.threshold == select(weights(), fraction=0.1).threshold
    assert list(found.suggestions) == ["1%", "5%", "10%", "20%"]  # too small for 5M
    for label, threshold in found.suggestions.items():
        exact = select(weights(), fraction=float(label[:-1]) / 100, zeros="skip").threshold
        assert threshold == pytest.approx(exact, rel=0.02)


def test_histogram_holds_every_weight():
    found = analyze(weights(), fraction=0.1)
    assert int(found.survey.histogram.sum()) == 81_200


def test_block_names():
    assert block_of("input_blocks.4.1.proj.weight") == "input_blocks.4"
    assert block_of("joint_blocks.3") == "joint_blocks.3"
    assert block_of("context_embedder.weight") == "context_embedder"


@pytest.mark.parametrize("zeros", ["train", "skip"])
def test_a_threshold_for_a_budget_selects_no_fewer(zeros):
    torch.manual_seed(4)
    levels = torch.randint(0, 20, (100, 100)).float()  # 5 % zeros, and 5 % of each other level
    for share, expected in ((0.02, 0.05), (0.08, 0.1), (0.12, 0.15)):
        found = analyze({"w": levels}, fraction=share, zeros=zeros)
        trained = select({"w": levels}, threshold=found.cutoff.threshold, zeros=zeros)
        assert found.total.num_selected == trained.num_selected
        assert share <= found.total.num_selected / 1e4 <= 1.15 * expected
