"""Read the checkpoints of the authors' own code: absolute values by number of the parameter.

Such a file is a pickled dict: `threshold`, and for each parameter of diffusers' UNet, in its order,
the trained weights in the order of their positions. It holds no names, positions or shapes: those are
rebuilt from the base it was trained on, as all weights below the threshold were trained. Only SD1.x
and SD2.x models were ever trained with it.

Source: save_params in optim/adamw.py of https://github.com/sjtuplayer/SaRA at ea21192.
"""

import os
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..weights import at_positions
from ..weights.fingerprint import take_fingerprint
from ..weights.magnitudes import small_weight_index
from .delta_file import DeltaEntry
from .sparse_delta import SparseDelta


def read_authors_checkpoint(
    path: str | os.PathLike, base: Mapping[str, Tensor], order: Sequence[str]
) -> SparseDelta:
    """Turn a checkpoint of the authors' code into a delta.

    Args:
        path: File such as `unet.pt`. Nothing in it is executed.
        base: Weights it was trained on, by name, in the precision it was trained in.
        order: Names of the base in the order of diffusers' parameters, see `diffusers_order`.

    Raises:
        ValueError: Not such a file, or it does not fit this base.
        FileNotFoundError: No such file.
    """
    saved = _read(path)
    threshold = saved["threshold"]
    numbers = sorted(key for key in saved if isinstance(key, int))
    if numbers != list(range(len(order))):
        raise ValueError(
            f"{path} holds {len(numbers)} parameters, this model has {len(order)}; load the "
            "checkpoint it was trained on (SD1.x or SD2.x)"
        )
    entries = {}
    for number, name in enumerate(order):
        values, weight = saved[number].detach().float().cpu(), base[name].detach()
        index = small_weight_index(weight, threshold).cpu()
        if values.shape != index.shape:
            raise ValueError(
                f"{path} has {values.numel()} weights for {name}, but {len(index)} of this base are "
                f"below its threshold {threshold:g}; it was trained on another base, or on this one "
                "in another precision"
            )
        if not bool(torch.isfinite(values).all()):
            raise ValueError(f"{path} holds values that are NaN or infinite, for {name}")
        change = values - at_positions.read(weight.cpu().float(), index)
        moved = change != 0
        if bool(moved.any()):
            entries[name] = DeltaEntry(index[moved], change[moved], tuple(weight.shape))
    if not entries:
        raise ValueError(f"{path} changes nothing in this base")
    return SparseDelta(
        entries,
        {
            "sara.threshold": repr(float(threshold)),
            "sara.fingerprint": take_fingerprint(base, entries),
            "sara.source": "the authors' code",
        },
    )


def diffusers_order(names: Sequence[str]) -> list[str]:
    """Sort the parameter names of a diffusers UNet as its modules are made.

    Attributes follow each other as the constructors assign them: attentions before resnets, the
    way down before the way up, the middle after both.
    """
    return sorted(names, key=lambda name: [_rank(part) for part in name.split(".")])


RANKS = {
    part: rank
    for rank, part in enumerate(
        (
            "conv_in", "time_embedding", "linear_1", "linear_2", "down_blocks", "up_blocks",
            "mid_block", "conv_norm_out", "conv_out", "attentions", "resnets", "downsamplers",
            "upsamplers", "norm", "proj_in", "transformer_blocks", "norm1", "attn1", "conv1",
            "time_emb_proj", "norm2", "attn2", "conv2", "conv_shortcut", "norm3", "ff", "proj_out",
            "to_q", "to_k", "to_v", "to_out", "net", "proj", "conv", "weight", "bias",
        )
    )
}  # fmt: skip


def _rank(part: str) -> int:
    return int(part) if part.isdigit() else RANKS[part]


def _read(path: str | os.PathLike) -> dict:
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no such file: {path}")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a parser of unknown bytes may raise anything
        raise ValueError(f"{path} is no PyTorch file that can be read safely: {error}") from error
    threshold = saved.get("threshold") if isinstance(saved, dict) else None
    is_number = isinstance(threshold, (int, float)) and 0 < threshold < float("inf")
    tensors = [v for k, v in saved.items() if k != "threshold"] if is_number else []
    if not tensors or not all(isinstance(v, Tensor) and v.dim() == 1 for v in tensors):
        raise ValueError(
            f"{path} is no checkpoint of the authors' SaRA code: expected a dict with 'threshold' and "
            "one list of values per parameter"
        )
    return saved
