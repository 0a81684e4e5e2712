"""Choose the parameters of a module that may train, by name, and see their shapes as matrices."""

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from .quantised import Quantised
from .shards import held

TRAINABLE_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def choose_parameters(
    module: nn.Module,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    biases_and_norms: bool = False,
) -> dict[str, nn.Parameter]:
    """List the parameters SaRA may train, by name, each shared (tied) parameter once.

    By default every floating-point parameter of two or more dimensions that requires a gradient:
    Linear, convolution and embedding weights.

    Args:
        module: The model. Not modified.
        include: Wildcard patterns (`*`, `?`, `[...]`); only names in which one of them occurs are
            kept. A single string may hold several, separated by commas or line breaks.
        exclude: Likewise; names in which one of them occurs are left out.
        biases_and_norms: Also take parameters of fewer than two dimensions.

    Raises:
        ValueError: A pattern occurs in no name, no parameter is left, or two different parameters
            share memory.
    """
    named = {n: p for n, p in module.named_parameters() if p.is_floating_point() and p.numel()}
    trainable = {n: p for n, p in named.items() if p.requires_grad}
    wanted = filter_parameters(named, include, exclude, biases_and_norms)
    chosen = {n: p for n, p in trainable.items() if n in wanted}
    if not chosen:
        raise ValueError(
            f"no parameter to train: of {len(named)} floating-point parameters "
            f"{len(named) - len(trainable)} have requires_grad=False, and the others are biases, "
            "norms or excluded. Call model.requires_grad_(True), widen the patterns or set "
            "biases_and_norms"
        )
    _refuse_overlapping(chosen)
    return chosen


def filter_parameters(
    parameters: Mapping[str, Tensor],
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    biases_and_norms: bool = False,
) -> dict[str, Tensor]:
    """Narrow weights down by name, type and number of dimensions; see `choose_parameters`.

    Raises:
        ValueError: A pattern occurs in no name.
    """
    kept = _occurring(parameters, include, "include") if _split(include) else set(parameters)
    kept -= _occurring(parameters, exclude, "exclude")
    min_dims = 0 if biases_and_norms else 2
    return {
        name: weight
        for name, weight in parameters.items()
        if name in kept
        and weight.is_floating_point()
        and weight.numel()
        and weight.dim() >= min_dims
    }


def _split(patterns: str | Iterable[str] | None) -> list[str]:
    if isinstance(patterns, str):
        patterns = patterns.replace("\n", ",").split(",")
    return [p.strip() for p in patterns or () if p.strip()]


def _occurring(names: Iterable[str], patterns: str | Iterable[str] | None, what: str) -> set[str]:
    found = set()
    for pattern in _split(patterns):
        matches = {name for name in names if fnmatchcase(name, f"*{pattern}*")}
        if not matches:
            examples = ", ".join(list(names)[:3])
            raise ValueError(
                f"{what} pattern {pattern!r} occurs in no parameter name; names look like {examples}"
            )
        found |= matches
    return found


def _refuse_overlapping(parameters: Mapping[str, Tensor]) -> None:
    spans = []
    for name, parameter in parameters.items():
        p = held(parameter)
        if p.numel() and p.device.type != "meta" and not isinstance(p, Quantised):
            extent = sum((n - 1) * s for n, s in zip(p.shape, p.stride(), strict=True)) + 1
            begin = p.data_ptr()
            spans.append((str(p.device), begin, begin + extent * p.element_size(), name))
    spans.sort()
    for (device, _, end, name), (device2, begin, _, other) in zip(spans, spans[1:], strict=False):
        if device == device2 and begin < end:
            raise ValueError(
                f"parameters {name!r} and {other!r} are different objects that share memory, so "
                "training one would change the other; tie them as one nn.Parameter or exclude one"
            )


def as_matrix_shape(shape: torch.Size | tuple[int, ...]) -> tuple[int, int]:
    """View a weight's shape as `(out, rest)`: conv kernels become `(out, in * kh * kw)`."""
    rows = shape[0] if len(shape) else 1
    columns = 1
    for size in shape[1:]:
        columns *= size
    return rows, columns


def refuse_untrainable_dtypes(parameters: Mapping[str, Tensor]) -> None:
    """Refuse parameters whose values cannot be changed in place, such as float8.

    Raises:
        TypeError: There are some.
    """
    wrong = {n: p.dtype for n, p in parameters.items() if p.dtype not in TRAINABLE_DTYPES}
    if wrong:
        name, dtype = next(iter(wrong.items()))
        raise TypeError(
            f"{len(wrong)} parameters are of a dtype that cannot be trained in place, such as "
            f"{name!r} ({dtype}); load the model in float32, float16 or bfloat16"
        )
