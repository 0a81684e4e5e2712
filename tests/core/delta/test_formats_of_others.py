"""Export as differences and LoRA, import of the authors' checkpoints, strengths of blocks."""

import hashlib
import pickle
from itertools import product

import pytest
import torch

from sara_core import DeltaEntry, SparseDelta
from sara_core.delta.authors_format import diffusers_order, read_authors_checkpoint
from sara_core.delta.block_strengths import blocks_in, parse_strengths, scale_blocks
from sara_core.delta.export import as_differences, as_lora

from ...diffusers_names import SD15, parameter_names


def sparse(*shape, seed=0, density=0.2, name=None):
    generator = torch.Generator().manual_seed(seed)
    numel = torch.Size(shape).numel()
    index = (torch.rand(numel, generator=generator) < density).nonzero()[:, 0].int()
    return DeltaEntry(index, torch.randn(len(index), generator=generator), shape)


def whole(entry):
    dense = torch.zeros(entry.shape)
    for position, value in zip(entry.index.tolist(), entry.values.tolist(), strict=True):
        dense.view(-1)[position] = value
    return dense


def test_differences_are_the_changes_themselves():
    delta = SparseDelta({"a.weight": sparse(5, 7), "b.bias": sparse(9), "c.table": sparse(2, 3)})
    found = as_differences(delta, torch.float32)
    names = {"a": "a.weight", "b.bias": "b.bias", "c.table": "c.table"}
    assert found.keys() == {f"diffusion_model.{key}.diff" for key in names}
    for key, name in names.items():
        assert torch.equal(found[f"diffusion_model.{key}.diff"], whole(delta.entries[name]))


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (4, 3, 3, 3), (8, 5, 3)])
def test_a_lora_of_full_rank_is_exact(shape):
    delta = SparseDelta({"a.weight": sparse(*shape)})
    tensors, kept = as_lora(delta, 100, torch.float32)
    up, down = (tensors[f"diffusion_model.a.lora_{side}.weight"] for side in ("up", "down"))
    rank = down.shape[0]
    assert float(tensors["diffusion_model.a.alpha"]) == rank
    assert down.shape == (rank, *shape[1:])
    assert up.shape == (shape[0], rank, *[1] * (len(shape) - 2))
    product_ = up.reshape(shape[0], rank) @ down.reshape(rank, -1)
    assert torch.allclose(product_.view(shape), whole(delta.entries["a.weight"]), atol=1e-5)
    assert kept == pytest.approx(1.0, abs=1e-6)


def test_the_kept_energy_is_that_of_the_largest_singular_values():
    delta = SparseDelta(
        {"a.weight": sparse(40, 60), "b.weight": sparse(300, 200, seed=1), "c.bias": sparse(50)}
    )
    state = torch.get_rng_state()
    tensors, kept = as_lora(delta, 5, torch.float32)
    assert torch.equal(torch.get_rng_state(), state)
    energies = [
        torch.linalg.svdvals(whole(delta.entries[n]).double()) ** 2
        for n in ("a.weight", "b.weight")
    ]
    total = sum(e.sum() for e in energies) + whole(delta.entries["c.bias"]).double().square().sum()
    assert kept == pytest.approx(float(sum(e[:5].sum() for e in energies) / total), rel=0.02)
    assert not any("c" in key.split(".")[1] for key in tensors)
    with pytest.raises(ValueError, match="rank is 0"):
        as_lora(delta, 0)
    with pytest.raises(ValueError, match="no matrix"):
        as_lora(SparseDelta({"c.bias": sparse(50)}), 4)


def test_strengths_by_block():
    entries = {f"blocks.{i}.{n}.weight": sparse(3, 4, seed=i) for i, n in product((0, 1, 10), "ab")}
    told = {"k": "v", "sara.fingerprint": "float32:"}
    delta = SparseDelta(entries | {"head.weight": sparse(2, 2)}, told)
    blocks = blocks_in(delta)
    assert blocks == ["blocks.0", "blocks.1", "blocks.10", "head"]
    strengths = parse_strengths("blocks.*: 0.5\n\n blocks.1 : -2  # more\nhead:0", blocks, 3.0)
    assert strengths == {"blocks.0": 0.5, "blocks.1": -2.0, "blocks.10": 0.5, "head": 0.0}
    scaled = scale_blocks(delta, strengths)
    assert scaled.metadata == {"k": "v"}  # the fingerprint was of all layers
    assert scale_blocks(delta, dict.fromkeys(blocks, 2.0)).metadata == told
    nothing = scale_blocks(delta, dict.fromkeys(blocks, 0.0))
    assert nothing.entries == {}
    assert nothing.fits_base({})
    assert "head.weight" not in scaled.entries
    for name, entry in scaled.entries.items():
        factor = strengths[".".join(name.split(".")[:2])]
        assert torch.equal(entry.values, entries[name].values * factor)
        assert torch.equal(entry.index, entries[name].index)
    assert parse_strengths("", blocks, 3.0) == dict.fromkeys(blocks, 3.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("blocks.0", r"line 1 is 'blocks.0'; expected a block and a number"),
        ("\nblocks.0: much", r"line 2 is 'blocks.0: much'"),
        ("blocks.0: nan", "expected a block and a number"),
        (": 0.5", "expected a block and a number"),
        ("blocks.7: 1", r"'blocks.7', which is no block of this delta; it has blocks.0, head"),
    ],
)
def test_bad_lines_are_named(text, message):
    with pytest.raises(ValueError, match=message):
        parse_strengths(text, ["blocks.0", "head"])


def test_parameters_are_sorted_as_diffusers_makes_them():
    names = parameter_names(*SD15)
    assert len(names) == 686
    digest = hashlib.sha256("\n".join(names).encode()).hexdigest()
    assert digest == "4917f5baabed9afc9c4bc8571a7540abe3772f40361f3a4353e76bd8785a38fb"
    assert diffusers_order(sorted(names)) == names


def base_and_file(path, threshold=0.5):
    """A base, and what the authors' code would save after it trained all below the threshold."""
    torch.manual_seed(0)
    base = {"x.weight": torch.randn(4, 5), "x.bias": torch.randn(5), "y.weight": torch.ones(2, 2)}
    learned = {name: weight.clone() for name, weight in base.items()}
    saved = {"threshold": threshold}
    for number, (name, weight) in enumerate(base.items()):
        mask = weight.abs() < threshold
        learned[name][mask] += 0.1
        saved[number] = learned[name][mask].requires_grad_(True)
    torch.save(saved, path)
    return base, learned


def test_an_authors_checkpoint_becomes_a_delta(tmp_path):
    base, learned = base_and_file(tmp_path / "unet.pt")
    delta = read_authors_checkpoint(tmp_path / "unet.pt", base, list(base))
    assert delta.entries.keys() == {"x.weight", "x.bias"}
    for name, entry in delta.entries.items():
        found = base[name] + whole(entry)
        assert torch.allclose(found, learned[name], atol=1e-7), name
    assert delta.fits_base(base)
    assert delta.metadata["sara.threshold"] == "0.5"


class Malicious:
    def __reduce__(self):
        return (print, ("executed",))


def test_bad_checkpoints_are_refused_and_nothing_in_them_runs(tmp_path, capsys):
    base, _ = base_and_file(tmp_path / "unet.pt")
    order = list(base)

    def refused(message, path=tmp_path / "bad.pt", base=base, order=order):
        with pytest.raises(ValueError, match=message):
            read_authors_checkpoint(path, base, order)

    refused(r"below its threshold 0\.5.*another base", tmp_path / "unet.pt",
            {name: weight * 3 for name, weight in base.items()})  # fmt: skip
    refused("holds 3 parameters, this model has 2", tmp_path / "unet.pt", order=order[:2])
    (tmp_path / "bad.pt").write_bytes(pickle.dumps({"threshold": Malicious()}))
    refused("cannot be|no PyTorch file that can be read safely")
    torch.save({"threshold": 0.5, 0: Malicious()}, tmp_path / "bad.pt")
    refused("no PyTorch file that can be read safely")
    assert "executed" not in capsys.readouterr().out
    for content in ([1], {"threshold": 0.5}, {"threshold": "0.5", 0: torch.ones(2)}, {0: torch.ones(2)},
                    {"threshold": 0.5, 0: torch.ones(2, 2)}):  # fmt: skip
        torch.save(content, tmp_path / "bad.pt")
        refused("no checkpoint of the authors' SaRA code")
    saved = torch.load(tmp_path / "unet.pt", weights_only=True)
    torch.save(
        {k: v * float("nan") if k == 0 else v for k, v in saved.items()}, tmp_path / "bad.pt"
    )
    refused("NaN or infinite, for x.weight")
    (tmp_path / "bad.pt").write_bytes((tmp_path / "unet.pt").read_bytes()[:200])
    refused("no PyTorch file")
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_authors_checkpoint(tmp_path / "none.pt", base, order)
