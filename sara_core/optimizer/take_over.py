"""What was learned before, taken over into a model: the weights of a saved run, or a delta."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..delta.sparse_delta import SparseDelta
from ..weights import at_positions
from ..weights.fingerprint import is_same_base
from ..weights.quantised import Quantised, learned_on
from ..weights.selection import Selection
from ..weights.shards import Shard, held, reshard, total
from .sparse_model import SparseModel
from .sparse_weight import SparseWeight


def take_over_weights(
    model: SparseModel, records: Sequence[Mapping], fingerprint: str, averaged: bool = False
) -> list[slice]:
    """Take over a saved selection with its values; base values are put back first.

    Args:
        model: Of the module to go on with.
        records: What `SparseModel.state` returned.
        fingerprint: Of the base it was saved on.
        averaged: Take over averages of the values, too.

    Returns:
        Which of the values of each record that is not frozen are held in this process.

    Raises:
        ValueError: It does not fit the module; nothing has been changed then.
    """
    _refuse_unfitting(model, records)
    index: dict[str, Tensor] = {}
    for record in records:
        parts = [index[record["name"]]] if record["name"] in index else []
        index[record["name"]] = torch.cat([*parts, record["index"].cpu()])
    if not is_same_base(fingerprint, model.parameters, index):
        raise ValueError(
            "the saved state was trained on another base than this model holds; load the "
            "checkpoint it was started from"
        )
    model.restore_()
    if not all(_holds(model, record) for record in records):
        for weight in (*model.active, *model.frozen):
            weight.write_(weight.trained, weight.index)
        raise ValueError(
            "the saved state was trained on another base than this model holds: its smallest "
            "weights differ, as if a delta or a merge had been part of one of them"
        )
    model.active, model.frozen = [], []
    taken = []
    for record in records:
        parameter = model.parameters[record["name"]]
        shard = Shard(parameter)
        own, index_here = shard.in_part(record["index"])
        positions, base, values = (
            saved.to(learned_on(parameter), copy=True)
            for saved in (index_here, record["base"][own], record["values"][own])
        )
        weight = SparseWeight(record["name"], parameter, positions, base, values, shard)
        weight.threshold = record.get("threshold")
        if "rates" in record:
            weight.rates = record["rates"][own].to(learned_on(parameter), copy=True)
        if averaged and "average" in record:
            weight.average = record["average"][own].to(learned_on(parameter), copy=True)
        (model.frozen if record["frozen"] else model.active).append(weight)
        if not record["frozen"]:
            taken.append(own)
        weight.write_(values, positions)  # last: what is in neither list could not be put back
    model.attach()
    reshard(model.module)
    return taken


def take_over_delta(model: SparseModel, delta: SparseDelta) -> None:
    """Change the selected weights by what a delta holds, as if they had just learned it.

    Args:
        model: On the base the delta was trained on.
        delta: Learned from weights that are selected.

    Raises:
        ValueError: It does not fit the selection or the base; nothing has been changed then.
    """
    places = _places(model, delta)
    if not delta.fits_base(model.parameters):
        raise ValueError(
            "the delta was trained on another base than this model holds; load the checkpoint it was "
            "trained on"
        )
    for weight in model.active:
        if weight.name in places:
            own, at = places[weight.name]
            values, learned = weight.trained.clone(), delta.entries[weight.name].values[own]
            values[at] += learned.to(values.device, values.dtype)
            weight.write_(values, weight.index)
    reshard(model.module)


def selection_of(delta: SparseDelta, parameters: Mapping[str, Tensor]) -> Selection:
    """Return the selection that a delta was learned from: that of all weights it holds a change of.

    Raises:
        ValueError: It is of other parameters.
    """
    index: dict[str, Tensor] = {}
    for name, entry in delta.entries.items():
        found = parameters.get(name)
        if found is None or tuple(found.shape) != tuple(entry.shape):
            raise ValueError(
                f"the delta changes {name!r}, {tuple(entry.shape)}, which this model does not have or not to "
                "train; load the checkpoint it was trained on, with the same patterns of names"
            )
        index[name] = Shard(found).in_part(entry.index)[1].to(learned_on(found))
    return Selection(math.inf, index, sum(p.numel() for p in parameters.values()), 0, False)


def first_of_each(parameters: Mapping[str, Tensor]) -> Selection:
    """Select one weight of each parameter, until `take_over_weights` says which it is to be."""
    index = {
        name: torch.zeros(1, dtype=torch.int32, device=learned_on(parameter))
        for name, parameter in parameters.items()
    }
    return Selection(math.inf, index, sum(p.numel() for p in parameters.values()), 0, False)


def _places(model: SparseModel, delta: SparseDelta) -> dict[str, tuple[slice, Tensor]]:
    """Say which of a delta's values are held here, and where in the selection, by parameter name."""
    weights = {weight.name: weight for weight in model.active}
    places, outside = {}, 0
    for name, entry in delta.entries.items():
        if name not in weights or tuple(weights[name].parameter.shape) != tuple(entry.shape):
            outside += len(entry.index)
            continue
        index = weights[name].index
        own, wanted = weights[name].shard.in_part(entry.index)
        wanted = wanted.to(index.device, index.dtype)
        found = torch.isin(wanted, index, assume_unique=True)
        places[name] = own, torch.searchsorted(index, wanted)
        outside += int(total(weights[name].parameter, (~found).sum()))
    if outside:
        raise ValueError(
            f"the delta changes {outside} weights that are not selected here; load the checkpoint it "
            "was trained on, and select with its threshold, or its fraction, and patterns of names; a delta "
            "with a threshold was selected from the whole model (by_parameter=False)"
        )
    return places


def _holds(model: SparseModel, record: Mapping) -> bool:
    """Tell whether the module holds a record's base values, or its trained ones."""
    parameter = model.parameters[record["name"]]
    own, index = Shard(parameter).in_part(record["index"])
    found = at_positions.read(held(parameter), index.to(parameter.device)).cpu()
    candidates = (record["base"].to(found.dtype), record["values"].to(found.dtype))
    others = [int(not torch.equal(found, values[own].cpu())) for values in candidates]
    return not all(total(parameter, torch.tensor(others)).tolist())


def _refuse_unfitting(model: SparseModel, records: Sequence[Mapping]) -> None:
    faults = []
    for record in records:
        name, shape = record["name"], tuple(record["shape"])
        parameter = model.parameters.get(name)
        if parameter is None:
            faults.append(f"{name} is missing")
        elif tuple(parameter.shape) != shape:
            faults.append(f"{name} is {tuple(parameter.shape)}, saved {shape}")
        elif parameter.dtype != record["base"].dtype and not isinstance(parameter, Quantised):
            faults.append(f"{name} is {parameter.dtype}, saved {record['base'].dtype}")
        elif not _is_sound(record, parameter.numel()):
            faults.append(f"{name} has positions or values that do not belong together")
    if faults:
        more = f"; and {len(faults) - 10} more" if len(faults) > 10 else ""
        raise ValueError(
            f"the saved state belongs to another model: {'; '.join(faults[:10])}{more}. Load "
            "the model it was trained on, in the same dtype"
        )


def _is_sound(record: Mapping, numel: int) -> bool:
    index = record["index"].long()
    ascending = bool((index.diff() > 0).all())
    in_range = len(index) > 0 and int(index[0]) >= 0 and int(index[-1]) < numel
    lengths = {len(record[key]) for key in ("base", "values", "average", "rates") if key in record}
    return ascending and in_range and lengths == {len(index)}
