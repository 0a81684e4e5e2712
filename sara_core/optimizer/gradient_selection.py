"""Choose the weights that train by gradients: those that learn most for what they would make the model forget.

Of small steps that are as large for each weight, one of the gradient `g` of what is to be learned gains `|g|`, and
loses about `f`, the mean square of the gradient of what is to be kept (the diagonal of the Fisher information, the
importance of a weight in Kirkpatrick et al. 2017, arXiv:1612.00796). The weights with the largest `|g| / sqrt(f)`
are chosen, and trained at rates that go with `|g| / f`, the step that gains most for what is lost; without anything
to keep, those with the largest `|g|` at one rate. How this compares with the smallest weights is measured in
docs/evidence.md.

Both go by each parameter: weights that act together lose more than `f` says, in some layers by far, so that
layers cannot be compared by it.
"""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..weights import at_positions
from ..weights.magnitudes import count_equal
from ..weights.parameters import choose_parameters
from ..weights.quantised import learned_on
from ..weights.selection import Selection, refuse_unfitting, select
from ..weights.shards import held, is_sharded, reshard, total
from .data_parallel import is_shared, refuse_wrapped
from .ranking import Ranking
from .sparse_model import refuse_owned
from .weight_rates import coded

LEAST = 1e-4  # of a parameter's mean importance, what every weight has at least
LARGEST = 0x7F7FFFFF  # bits of the largest finite float32
SUM = 4  # bytes of a weight for a sum over passes

Together = Callable[[Callable[[], Any]], Any]


class NotFinite(FloatingPointError):
    """A gradient was not finite, in all processes alike."""


def select_by_gradient(
    module: nn.Module,
    learn: Callable[[], None],
    keep: Callable[[], None] | None = None,
    *,
    fraction: float,
    by_parameter: bool = True,
    chosen: Mapping[str, Tensor] | None = None,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    biases_and_norms: bool = False,
    most_bytes: float = math.inf,
    tell: Callable[[int, int], None] = lambda part, of: None,
    together: Together = lambda act: act(),
    distributed: bool = True,
    process_group: "dist.ProcessGroup | None" = None,
) -> Selection:
    """Select the weights that learn most for what they make the model forget.

    Weights without any gradient are never chosen, so that a parameter may give less than its share. The module and
    its `requires_grad` are left as they were; gradients it holds are dropped.

    Args:
        module: The model, as `SaraAdamW` will get it.
        learn: Makes backward passes over what is to be learned: some 64 pictures in all, each at a noise level of
            its own. Their gradients add up. It is called again for each part of the model that is
            looked at, and should go over the same then.
        keep: The same over what the model is to keep as it is, of which the squares of the gradients add up:
            best a pass for each of some 100 pictures. Under `fully_shard` they are those of means over processes.
        fraction: Share of the chosen parameters' weights, in `(0, 1]`.
        by_parameter: Take that share of each parameter, at least one weight. If not, it is of all of them together,
            ranked to an eighth of an octave, for which a byte a weight is kept in main memory, and
            without rates of their own.
        chosen: Positions by parameter name that were chosen before, as in `Selection.index`, also by size: only
            their rates are looked for, which needs `keep`.
        include: See `choose_parameters`.
        exclude: See `choose_parameters`.
        biases_and_norms: See `choose_parameters`.
        most_bytes: What the sums may take at a time, 4 bytes a weight or 8 with `keep`; a single parameter may
            take more. The model is looked at in as many parts as that needs.
        tell: Called before each part with its number, from 1, and that of all.
        together: Does what may fail for want of memory; where processes choose together, it has to fail in all
            of them if it does in one.
        distributed: Where torch.distributed is initialised, go by the gradients of all processes.
        process_group: Which those are; by default all of them.

    Returns:
        For `SaraAdamW`; its threshold is infinity, as size is no matter.

    Raises:
        ValueError: A fraction out of range, no parameter to train, or none that gets a gradient.
        RuntimeError: Another SaraAdamW trains the model.
        TypeError: The model is wrapped in DistributedDataParallel or FullyShardedDataParallel.
        NotFinite: A gradient was not.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction is {fraction!r}; expected a number above 0 and at most 1")
    refuse_wrapped(module)
    reshard(module)
    parameters = considered = choose_parameters(module, include, exclude, biases_and_norms)
    refuse_owned(parameters)
    if chosen is not None:
        if keep is None:
            raise ValueError("rates go by what is to be kept; give keep, or leave chosen out")
        refuse_unfitting(Selection(math.inf, dict(chosen), 0, 0, False), parameters)
        parameters = {name: parameters[name] for name in chosen}
        chosen = {name: index.to(learned_on(parameters[name])) for name, index in chosen.items()}
    group = process_group if distributed and is_shared(process_group) else False
    ways = [(learn, _add), *([] if keep is None else [(keep, _add_square)])]
    parts = list(_parts(parameters, most_bytes / SUM / len(ways)))
    index: dict[str, Tensor] = {} if chosen is None else dict(chosen)
    rates: dict[str, Tensor] = {}
    ranking = None if by_parameter or chosen is not None else Ranking()
    for number, part in enumerate(parts, 1):
        tell(number, len(parts))
        sums = [_sums(module, part, go_over, add, group, together) for go_over, add in ways]
        reshard(module)
        taken = together(lambda sums=sums: _taken(sums, fraction, ranking, chosen))  # type: ignore[misc]
        index |= {name: positions for name, (positions, _) in taken.items()}
        rates |= {name: codes for name, (_, codes) in taken.items() if codes is not None}
        del sums  # before the next are made
    if ranking is not None:
        index = {
            name: found.to(learned_on(parameters[name]))
            for name, found in together(lambda: ranking.largest(fraction)).items()
        }
    if not index:
        raise ValueError(
            "no weight is selected: none of the chosen parameters has got a gradient, so there would be "
            "nothing to train. Let backward reach the model's weights"
        )
    zeros = sum(int(total(p, torch.tensor(count_equal(p, 0.0)))) for p in considered.values())
    numel = sum(p.numel() for p in considered.values())
    return Selection(math.inf, index, numel, zeros, False, weight_rates=rates)


def _parts(parameters: Mapping[str, nn.Parameter], most: float) -> Iterator[dict]:
    """Divide parameters into parts of so many weights at most, but for single ones."""
    part: dict[str, nn.Parameter] = {}
    count = 0
    for name, parameter in parameters.items():
        size = parameter.numel()
        if part and count + size > most:
            yield part
            part, count = {}, 0
        part[name] = parameter
        count += size
    yield part


def _add(sums: Tensor, gradient: Tensor) -> None:
    sums.add_(gradient)


def _add_square(sums: Tensor, gradient: Tensor) -> None:
    sums.addcmul_(gradient, gradient)


def _sums(
    module: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    go_over: Callable[[], None],
    add: Callable[[Tensor, Tensor], None],
    group: Any,
    together: Together,
) -> dict[str, Tensor]:
    """Add something up of the gradients of each pass, float32; no two dense gradients need exist at a time."""
    sums = together(lambda: {name: _zeros(parameter) for name, parameter in parameters.items()})
    with contextlib.ExitStack() as stack, torch.enable_grad():
        for name, parameter in module.named_parameters():
            parameter.grad = None
            if parameter.requires_grad:
                hook = _taker(sums.get(name), add)
                stack.callback(parameter.register_post_accumulate_grad_hook(hook).remove)
        together(go_over)
    if group is not False:
        for each in sums.values():
            if not is_sharded(each):
                dist.all_reduce(each, group=group)
                each.div_(dist.get_world_size(group))  # as those of divided ones are means
    return sums


def _zeros(parameter: nn.Parameter) -> Tensor:
    if is_sharded(parameter):
        return torch.zeros_like(parameter, dtype=torch.float32, requires_grad=False)
    return torch.zeros(parameter.shape, dtype=torch.float32, device=learned_on(parameter))


def _taker(sums: Tensor | None, add: Callable[[Tensor, Tensor], None]) -> Callable[[Tensor], None]:
    """Make a hook that takes a parameter's gradient away, and adds it up if there is where."""

    @torch.no_grad()
    def take(parameter: Tensor) -> None:
        gradient, parameter.grad = parameter.grad, None
        if gradient is not None and sums is not None:
            gradient = held(gradient)
            dense = gradient.to_dense() if gradient.is_sparse else gradient
            add(held(sums), dense.to(held(sums)))

    return take


@torch.no_grad()
def _taken(
    sums: list[dict[str, Tensor]],
    fraction: float,
    ranking: Ranking | None,
    chosen: Mapping[str, Tensor] | None,
) -> dict[str, tuple[Tensor, Tensor | None]]:
    """Return positions and codes of rates by parameter name, or have them ranked with others; the sums are used up."""
    found: dict[str, tuple[Tensor, Tensor | None]] = {}
    for name in list(sums[0]):
        gains, *harms = (each.pop(name) for each in sums)
        _refuse_infinite(name, gains, *harms)
        score = _score(gains, *harms)
        if ranking is not None:
            ranking.take(name, score)
            continue
        positions = _largest(score, fraction) if chosen is None else chosen.get(name)
        if positions is not None:
            found[name] = positions, _rates(score, harms[0], positions) if harms else None
    return found


def _refuse_infinite(name: str, *sums: Tensor) -> None:
    for each in sums:
        here = held(each)
        largest = here.abs().amax() if here.numel() else here.new_zeros(())
        if int(total(each, (~torch.isfinite(largest)).long())):
            raise NotFinite(
                f"the gradient of {name!r} was not finite while weights were chosen by it; compute in fp32 "
                "or bf16, or check what the model is given"
            )


def _score(gains: Tensor, harms: Tensor | None = None) -> Tensor:
    """Return `|g| / sqrt(f)`, in place of the gains; in place of the harms is `1 / sqrt(f)` then."""
    size = held(gains).abs_()
    if harms is not None:
        harm = held(harms)
        least = LEAST * float(total(harms, harm.sum())) / harms.numel()
        size.mul_(harm.add_(least + torch.finfo(harm.dtype).tiny).rsqrt_())
    return gains


def _largest(score: Tensor, fraction: float) -> Tensor | None:
    """Return the sorted flat positions of the largest entries, none of them 0, of those held here.

    None if all are 0.
    """
    wanted = max(1, round(fraction * score.numel()))
    count = min(wanted, int(total(score, torch.count_nonzero(held(score)))))
    # The bits of what is not negative sort as it does, so this puts the largest first.
    bits = held(score).view(torch.int32)
    bits.neg_().add_(LARGEST)
    found = select({"": score}, num_trainable=count, zeros="train").index[""] if count else None
    bits.neg_().add_(LARGEST)
    return found


def _rates(score: Tensor, root: Tensor, positions: Tensor) -> Tensor:
    """Return codes of `|g| / f` at some positions; `score` and `root` are what `_score` left."""
    octaves = at_positions.read(held(score), positions).log2_()
    octaves.add_(at_positions.read(held(root), positions).log2_())
    return coded(octaves, score)
