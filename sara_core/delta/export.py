"""Turn a delta into formats that others load: dense differences, or a low-rank approximation.

Keys are those of ComfyUI's generic LoRA format: `diffusion_model.` and the parameter's own name
without `.weight`.
"""

import torch
from torch import Tensor

from ..weights.parameters import as_matrix_shape
from .delta_file import DeltaEntry
from .sparse_delta import SparseDelta

PREFIX = "diffusion_model."
EXACT = "differences (exact)"
RANKS = {"LoRA of rank 16": 16, "LoRA of rank 64": 64, "LoRA of rank 256": 256}
OVERSAMPLING, POWER_ITERATIONS = 16, 4  # of the randomised decomposition


def export(
    delta: SparseDelta, kind: str, dtype: torch.dtype = torch.float16
) -> tuple[dict[str, Tensor], float]:
    """Turn a delta into one of the formats named here: `EXACT` or one of `RANKS`.

    Returns:
        Tensors by key, and the share of the change's energy that is kept.

    Raises:
        ValueError: There is nothing to export.
    """
    if kind == EXACT:
        return as_differences(delta, dtype), 1.0
    return as_lora(delta, RANKS[kind], dtype)


def as_differences(delta: SparseDelta, dtype: torch.dtype = torch.float16) -> dict[str, Tensor]:
    """Return each parameter's change as a dense tensor of its shape, by its key.

    As exact as `dtype`, and as large as the changed layers themselves.

    Raises:
        ValueError: The delta changes nothing.
    """
    _refuse_empty(delta)
    return {f"{_key(name)}.diff": dense(e).to(dtype) for name, e in delta.entries.items()}


def as_lora(
    delta: SparseDelta, rank: int, dtype: torch.dtype = torch.float16
) -> tuple[dict[str, Tensor], float]:
    """Approximate the change of each matrix or convolution by one of low rank.

    Args:
        delta: What was learned.
        rank: Of each approximation, at least 1; a layer with a smaller side has that one.
        dtype: Of the tensors.

    Returns:
        Tensors by key, and the share of the change's energy that is kept: squared Frobenius norms
        over all parameters, those that are no matrices included. A sparse change is hardly of low
        rank, so expect to lose much of it.

    Raises:
        ValueError: The rank is not positive, or the delta holds no matrix.
    """
    if rank < 1:
        raise ValueError(f"rank is {rank}; expected at least 1")
    _refuse_empty(delta)
    tensors, kept, total = {}, 0.0, 0.0
    for name, entry in delta.entries.items():
        energy = float(entry.values.double().square().sum())
        total += energy
        if len(entry.shape) < 2 or not name.endswith(".weight"):
            continue
        matrix = dense(entry).view(as_matrix_shape(entry.shape))
        up, down = _factors(matrix, min(rank, *matrix.shape))
        kept += energy - float((matrix - up @ down).double().square().sum())
        ones = [1] * len(entry.shape[2:])
        tensors[f"{_key(name)}.lora_up.weight"] = up.view(*up.shape, *ones).to(dtype)
        tensors[f"{_key(name)}.lora_down.weight"] = down.view(-1, *entry.shape[1:]).to(dtype)
        tensors[f"{_key(name)}.alpha"] = torch.tensor(float(len(down)))
    if not tensors:
        raise ValueError("the delta changes no matrix or convolution, so no LoRA can be made of it")
    return tensors, max(0.0, kept) / total if total else 1.0


def dense(entry: DeltaEntry) -> Tensor:
    """Return one parameter's change as a dense float32 tensor on the CPU."""
    flat = torch.zeros(torch.Size(entry.shape).numel())
    flat[entry.index.cpu().long()] = entry.values.float().cpu()
    return flat.view(entry.shape)


def _factors(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return `up (rows, rank)` and `down (rank, columns)` with `up @ down` close to the matrix.

    Large ones by a randomised decomposition (Halko et al. 2011, arXiv:0909.4061), which leaves
    torch's random state as it was.
    """
    if min(matrix.shape) <= 4 * (rank + OVERSAMPLING):
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    else:
        with torch.random.fork_rng(devices=()):
            torch.random.default_generator.manual_seed(
                0
            )  # torch.manual_seed seeds graphics cards too
            u, s, v = torch.svd_lowrank(matrix, q=rank + OVERSAMPLING, niter=POWER_ITERATIONS)
        vh = v.T
    root = s[:rank].sqrt()
    return (u[:, :rank] * root).contiguous(), (root[:, None] * vh[:rank]).contiguous()


def _refuse_empty(delta: SparseDelta) -> None:
    if not delta.num_values:
        raise ValueError("the delta changes nothing, so there is nothing to export")


def _key(name: str) -> str:
    return PREFIX + name.removesuffix(".weight")
