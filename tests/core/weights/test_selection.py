import pytest
import torch
from torch import nn

from sara_core import select
from sara_core.weights.cutoff import parse_count
from sara_core.weights.magnitudes import CHUNK_ON_CPU, mark_small_weights
from sara_core.weights.parameters import choose_parameters


def model(*sizes):
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(m, n) for m, n in zip(sizes, sizes[1:], strict=False)))


def test_threshold_is_strict_and_ignores_the_sign():
    weight = torch.tensor([[-0.3, 0.1, -0.1, 0.0], [0.2, -0.2, 0.05, float("nan")]])
    marked = mark_small_weights(weight, 0.2)
    assert marked.tolist() == [[False, True, True, True], [False, False, True, False]]
    assert mark_small_weights(weight, 0.2, skip_zeros=True)[0].tolist() == [
        False,
        True,
        True,
        False,
    ]


def test_positions_count_row_major_whatever_the_memory_layout():
    weight = torch.tensor([[1.0, 0.1], [0.2, 1.0], [1.0, 0.3]])
    transposed = torch.tensor([[1.0, 0.2, 1.0], [0.1, 1.0, 0.3]]).T
    assert not transposed.is_contiguous()
    for w in (weight, transposed):
        assert select({"w": w}, threshold=0.5).index["w"].tolist() == [1, 2, 5]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 7, 100, 887])
def test_budget_gives_the_sorted_order_threshold(dtype, count):
    torch.manual_seed(1)
    weights = {"a": torch.randn(20, 30).to(dtype), "b": torch.randn(8, 4, 3, 3).to(dtype)}
    flat = torch.cat([w.float().abs().flatten() for w in weights.values()])
    selection = select(weights, num_trainable=count)
    expected = flat.sort().values[count]
    chosen = torch.cat(
        [weights[name].float().abs().flatten()[i.long()] for name, i in selection.index.items()]
    )
    assert len(chosen) == count
    assert int((chosen < expected).sum()) == int((flat < expected).sum())
    assert chosen.max() <= expected
    if chosen.max() < expected:
        assert selection.threshold == expected.item()
    else:  # a part of those at the border: none of the larger ones
        assert expected < selection.threshold <= flat[flat > expected].min()


def test_fraction_over_several_chunks_is_exact():
    torch.manual_seed(2)
    weight = torch.randn(CHUNK_ON_CPU + 1000)
    weight = weight.view(1, -1)
    selection = select({"w": weight}, fraction=0.1)
    expected = weight.abs().flatten().sort().values[round(0.1 * weight.numel())]
    assert selection.threshold == expected.item()
    index = torch.nonzero(weight.flatten().abs() < expected)[:, 0]
    assert torch.equal(selection.index["w"], index.int())


def test_everything_can_be_selected():
    weights = {"w": torch.randn(10, 10)}
    assert select(weights, fraction=1.0).num_selected == 100
    assert select(weights, num_trainable=100).num_selected == 100


def test_nothing_selected_is_an_error():
    with pytest.raises(ValueError, match="no weight is selected: none of 4"):
        select({"w": torch.ones(2, 2)}, threshold=0.5)
    with pytest.raises(ValueError, match="nothing to train"):
        select({"w": torch.zeros(2, 2)}, threshold=0.5)


def test_few_zeros_train_and_many_are_passed_by(caplog):
    torch.manual_seed(3)
    weight = torch.randn(100, 100)
    weight[0, :10] = 0
    few = select({"w": weight}, fraction=0.1)
    assert (few.num_selected, few.zeros_skipped) == (1000, False)
    assert set(range(10)) <= set(few.index["w"].tolist())
    assert not caplog.records

    weight[:50] = 0
    many = select({"w": weight}, fraction=0.1)
    assert (many.num_selected, many.num_zeros, many.zeros_skipped) == (500, 5000, True)
    assert int(many.index["w"].min()) >= 5000
    assert "5000 of 10000 weights are exactly zero" in caplog.text
    direct = select({"w": weight}, threshold=many.threshold)
    assert torch.equal(direct.index["w"], many.index["w"])


def test_of_equal_weights_an_evenly_spread_part_is_taken():
    weights = {
        "a": torch.tensor([0.1, 2.0, 2.0, -2.0, 3.0]),
        "b": torch.tensor([2.0, 0.2, -2.0, 2.0]),
    }
    found = select(weights, num_trainable=4)
    assert found.threshold == 3.0  # of which none is taken
    assert {name: index.tolist() for name, index in found.index.items()} == {
        "a": [0, 3],
        "b": [1, 3],
    }
    torch.manual_seed(6)
    levels = torch.randint(1, 4, (3, CHUNK_ON_CPU // 2)).float()
    index = select({"w": levels}, fraction=0.5, by_parameter=False).index["w"].long()
    assert len(index) == levels.numel() // 2
    at_border = index[levels.flatten()[index] == 2.0]
    assert len(at_border) == len(index) - int((levels == 1).sum())
    shares = torch.histc(at_border.float(), 8, 0, levels.numel()) / len(at_border)
    assert shares.sub(1 / 8).abs().max() < 0.005


def test_of_zeros_that_train_a_part_is_taken_where_fewer_are_asked_for():
    weight = torch.tensor([0.0, 0.5, 0.0, -0.25, 0.0, 1.0])
    found = select({"w": weight}, num_trainable=2, zeros="train")
    assert (found.threshold, found.index["w"].tolist()) == (1.0, [2, 4])
    assert select({"w": weight}, num_trainable=3, zeros="train").index["w"].tolist() == [0, 2, 4]
    assert select({"w": weight}, num_trainable=4, zeros="train").index["w"].tolist() == [0, 2, 3, 4]
    only = select({"w": torch.zeros(3)}, num_trainable=1, zeros="train")
    assert only.index["w"].tolist() == [2]
    assert only.threshold > 0


def test_zeros_can_be_forced_either_way():
    weight = torch.tensor([[0.0, 0.0, 0.0, 0.1, 0.2, 1.0]])
    assert select({"w": weight}, threshold=0.5, zeros="train").num_selected == 5
    assert select({"w": weight}, threshold=0.5, zeros="skip").index["w"].tolist() == [3, 4]
    assert select({"w": weight}, num_trainable=2, zeros="skip").index["w"].tolist() == [3, 4]
    with pytest.raises(ValueError, match="hold only 3 that are not exactly zero"):
        select({"w": weight}, num_trainable=4, zeros="skip")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_broken_base_is_refused_by_name(bad):
    weight = torch.randn(4, 4)
    weight[1, 1] = bad
    with pytest.raises(ValueError, match=r"NaN or infinite weights in layer\.weight \(1\)"):
        select({"ok": torch.randn(2, 2), "layer.weight": weight}, fraction=0.5)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({}, "exactly one of"),
        ({"threshold": 0.1, "fraction": 0.1}, r"got \['threshold', 'fraction'\]"),
        ({"threshold": 0.0}, "threshold is 0.0"),
        ({"threshold": float("nan")}, "threshold is nan"),
        ({"fraction": 1.5}, "fraction is 1.5"),
        ({"num_trainable": "5X"}, "'5X'"),
        ({"num_trainable": 5}, "5 weights are to train"),
        ({"threshold": 1.0, "zeros": "no"}, "zeros='no'"),
    ],
)
def test_bad_rules_say_what_is_wrong(rule, message):
    with pytest.raises(ValueError, match=message):
        select({"w": torch.ones(2, 2)}, **rule)


def test_counts_are_read_with_units():
    assert [parse_count(c) for c in (7, "5M", "0.5b", "200k", "1_000")] == [
        7,
        5_000_000,
        500_000_000,
        200_000,
        1000,
    ]


def test_default_takes_matrices_and_kernels_but_no_biases_or_norms():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.Embedding(5, 4))
    assert list(choose_parameters(net)) == ["0.weight", "2.weight"]
    assert len(choose_parameters(net, biases_and_norms=True)) == 5


def test_patterns_match_anywhere_in_the_name():
    net = model(4, 5, 6, 7)
    assert list(choose_parameters(net, include="1.weight, 2.w?ight")) == ["1.weight", "2.weight"]
    assert list(choose_parameters(net, exclude=["1.", "2."])) == ["0.weight"]
    with pytest.raises(ValueError, match=r"include pattern 'attn' occurs in no parameter name"):
        choose_parameters(net, include="attn")


def test_frozen_integer_and_empty_parameters_are_left_out():
    net = model(4, 5, 6)
    net[0].weight.requires_grad_(False)
    net.register_parameter("empty", nn.Parameter(torch.zeros(0, 3)))
    net.register_parameter("whole", nn.Parameter(torch.zeros(2, 2, dtype=torch.int32), False))
    assert list(choose_parameters(net)) == ["1.weight"]
    net.requires_grad_(False)
    with pytest.raises(ValueError, match=r"requires_grad=False.*requires_grad_\(True\)"):
        choose_parameters(net)


def test_tied_parameters_count_once_and_overlapping_ones_are_refused():
    net = model(4, 4, 4)
    net[1].weight = net[0].weight
    assert list(choose_parameters(net)) == ["0.weight"]
    net[1].weight = nn.Parameter(net[0].weight.data)
    with pytest.raises(ValueError, match=r"'0\.weight' and '1\.weight'.*share memory"):
        choose_parameters(net)
