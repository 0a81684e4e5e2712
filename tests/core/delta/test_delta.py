import copy

import pytest
import torch
from torch import nn

from sara_core import DeltaEntry, SaraAdamW, SparseDelta
from sara_core.weights import at_positions
from sara_core.weights.fingerprint import take_fingerprint

from ..helpers import Net, loss_of

THRESHOLD = 0.05


def entry(shape, index, values):
    return DeltaEntry(torch.tensor(index, dtype=torch.int32), torch.tensor(values), shape)


@pytest.fixture
def trained():
    net, base = Net(), Net()
    optimizer = SaraAdamW(net, THRESHOLD, lr=1e-2, progressive_step=3)
    for seed in range(6):
        loss_of(net, seed).backward()
        optimizer.step()
        optimizer.zero_grad()
    return base, net, optimizer.delta()


def test_delta_is_learned_minus_base_at_the_selected_positions(trained):
    base, net, delta = trained
    learned = dict(net.named_parameters())
    for name, parameter in base.named_parameters():
        if name not in delta.entries:
            assert torch.equal(learned[name], parameter)
            continue
        found = delta.entries[name]
        mask = parameter.abs() < THRESHOLD
        assert found.index.tolist() == torch.nonzero(mask.flatten())[:, 0].tolist()
        expected = (learned[name] - parameter).detach().flatten()[found.index.long()]
        assert torch.equal(found.values, expected)


def test_applying_gives_the_trained_weights_and_undoing_the_base(trained):
    base, net, delta = trained
    original = copy.deepcopy(base)
    undo = delta.apply_to(base)
    for a, b in zip(base.parameters(), net.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-8)  # base + (learned - base), one rounding
    undo()
    for a, b in zip(base.parameters(), original.parameters(), strict=True):
        assert torch.equal(a, b)


def test_an_error_half_way_leaves_the_model_as_it_was(trained, monkeypatch):
    base, _, delta = trained
    original = copy.deepcopy(base)
    write, calls = at_positions.write_, []

    def fail_at_the_third(*args):
        calls.append(1)
        if len(calls) == 3:
            raise MemoryError
        return write(*args)

    monkeypatch.setattr(at_positions, "write_", fail_at_the_third)
    with pytest.raises(MemoryError):
        delta.apply_to(base)
    assert len(calls) == 3 + 3  # each of them is put back
    for a, b in zip(base.parameters(), original.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("is_deterministic", [False, True])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_positions_are_row_major_in_any_layout_and_mode(is_deterministic, layout):
    dense = torch.arange(2.0 * 3 * 4 * 5).view(2, 3, 4, 5).to(memory_format=layout)
    expected = torch.arange(120.0)
    index = torch.tensor([0, 7, 61, 119], dtype=torch.int32)
    assert at_positions.read(dense, index).tolist() == [0, 7, 61, 119]
    torch.use_deterministic_algorithms(is_deterministic)
    try:
        assert at_positions.write_(dense, index, torch.full((4,), -1.0)) is dense
        at_positions.write_(dense, index[1:], torch.tensor([10.0, 20.0, 30.0]), True)
    finally:
        torch.use_deterministic_algorithms(False)
    expected[index.long()] = torch.tensor([-1.0, 9, 19, 29])
    assert torch.equal(dense, expected.view(2, 3, 4, 5))
    assert dense.is_contiguous(memory_format=layout)


def test_strength_scales_and_zero_changes_no_bit(trained):
    base, net, delta = trained
    original = copy.deepcopy(base)
    delta.apply_to(base, 0.0)
    for a, b in zip(base.parameters(), original.parameters(), strict=True):
        assert torch.equal(a, b)
    delta.apply_to(base, -1.5)
    change = base.last.weight - original.last.weight
    assert torch.allclose(change, -1.5 * (net.last.weight - original.last.weight), atol=1e-7)


def test_half_precision_model_is_rounded_once(trained):
    _, _, delta = trained
    half = Net().half()
    before = half.last.weight.detach().clone()
    delta.apply_to(half)
    found = delta.entries["last.weight"]
    dense = torch.zeros(before.numel()).index_add_(0, found.index, found.values).view_as(before)
    assert torch.equal(half.last.weight, (before.float() + dense).half())


def test_applying_to_another_base_warns_and_to_another_shape_refuses(trained, caplog):
    base, _, delta = trained
    delta.apply_to(base)
    delta.apply_to(base)  # selected weights have changed, the base is still the same
    delta.apply_to(Net().bfloat16())
    assert not caplog.records
    delta.apply_to(Net(seed=1))
    assert "trained on another base" in caplog.text
    small = nn.ModuleDict({"first": nn.Linear(3, 3), "last": nn.Linear(80, 70)})
    before = small["last"].weight.detach().clone()
    with pytest.raises(
        ValueError, match=r"conv\.weight is not in the model; .*first\.weight is \(3, 3\)"
    ):
        delta.apply_to(small)
    assert torch.equal(small["last"].weight, before)


def test_merging_adds_values_on_the_union_of_positions():
    a = SparseDelta({"x": entry((2, 3), [0, 2, 5], [1.0, 2.0, 3.0]), "y": entry((4,), [1], [7.0])})
    b = SparseDelta({"x": entry((2, 3), [2, 3], [10.0, 20.0]), "z": entry((2,), [0], [5.0])})
    merged = 0.5 * a + 2 * b
    assert list(merged.entries) == ["x", "y", "z"]
    x = merged.entries["x"]
    assert (x.index.tolist(), x.index.dtype) == ([0, 2, 3, 5], torch.int32)
    assert x.values.tolist() == [0.5, 21.0, 40.0, 1.5]
    assert merged.entries["y"].values.tolist() == [3.5]
    assert merged.entries["z"].values.tolist() == [10.0]
    assert merged.num_values == 6
    assert (a - a).entries["x"].values.tolist() == [0.0, 0.0, 0.0]
    assert a.entries["x"].values.tolist() == [1.0, 2.0, 3.0]


def test_merging_models_of_other_shapes_is_refused():
    a = SparseDelta({"x": entry((2, 3), [0], [1.0])})
    with pytest.raises(ValueError, match=r"x is \(3, 2\), in the delta \(2, 3\)"):
        a + SparseDelta({"x": entry((3, 2), [0], [1.0])})


def test_merge_keeps_what_both_say(trained):
    _, _, delta = trained
    other = SparseDelta(delta.entries, {**delta.metadata, "sara.steps": "99"})
    merged = 0.6 * delta + 0.6 * other
    assert merged.metadata["sara.fingerprint"] == delta.metadata["sara.fingerprint"]
    assert "sara.steps" not in merged.metadata


@pytest.mark.parametrize("text", ["", "float32", "int8:AAAA", "nonsense:%%", "float32:AAAA"])
def test_an_unreadable_fingerprint_counts_as_another_base(trained, text, caplog):
    base, _, delta = trained
    SparseDelta(delta.entries, {"sara.fingerprint": text}).apply_to(base)
    assert "trained on another base" in caplog.text


def test_a_sum_over_unequal_layers_knows_the_bases_of_its_parts(trained, caplog):
    base, _, delta = trained
    names = sorted(delta.entries)
    parts = []
    for own in (names[:1], names[1:]):
        entries = {name: delta.entries[name] for name in own}
        fingerprint = take_fingerprint(dict(Net().named_parameters()), own)
        parts.append(SparseDelta(entries, {"sara.fingerprint": fingerprint}))
    merged = 0.5 * parts[0] + 0.5 * (parts[1] + SparseDelta({}))
    merged.apply_to(base)
    assert not caplog.records
    merged.apply_to(Net(seed=1))
    assert "trained on another base" in caplog.text
    assert not (merged + merged).fits_base(dict(Net(seed=1).named_parameters()))
    broken = SparseDelta(merged.entries, {"sara.bases": "nonsense"})
    assert not broken.fits_base(dict(base.named_parameters()))


def test_a_double_precision_model_takes_it_without_rounding(trained):
    _, _, delta = trained
    model = Net().double()
    before = model.last.weight.detach().clone()
    delta.apply_to(model, strength=1 / 3)
    found = delta.entries["last.weight"]
    dense = torch.zeros(before.numel(), dtype=torch.float64)
    dense[found.index.long()] = found.values.double() / 3
    assert torch.allclose(model.last.weight, before + dense.view_as(before), rtol=0, atol=1e-16)
