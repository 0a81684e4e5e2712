"""The selected weights of one parameter, their base values and their float32 trained values."""

import torch
from torch import Tensor, nn

from ..weights import at_positions
from ..weights.at_positions import index_dtype
from ..weights.quantised import Quantised, learned_on
from ..weights.shards import Shard, held, refuse_other_division, total
from ..weights.to_device import send
from .weight_rates import factors

GAP_DTYPES = (torch.uint8, torch.int16, torch.int32)
SOME = 1 << 18  # base values put back, or rates looked at, in one go


class SparseWeight:
    """Weights of one parameter that train, or that trained and are now frozen.

    The parameter itself goes on holding all its weights; nothing dense is kept here. Per selected
    weight: the gap to the position before (one byte where weights lie densely), base value (the
    parameter's dtype), and the trained value in float32 where the parameter's own dtype is coarser.
    A float32 parameter holds the trained values itself, until `restore_` or `keep` copies them. Of a
    `Quantised` parameter no base value is kept, as what it is stored as doesn't change: it acts with the
    trained values that are kept here.

    Args:
        name: Parameter name.
        parameter: Shape `(*s)`, float32, float16, bfloat16 or float64. Changed only by `write_` and
            `restore_`. If it is divided over processes, everything else is about the part held here,
            and each process makes one of these.
        index: Shape `(k,)`, sorted flat row-major positions.
        base: Shape `(k,)`, base values in the parameter's dtype; read from it if left out, and of no
            account if it is quantised.
        values: Shape `(k,)`, trained values, float32 (float64 for a float64 parameter), not yet in the
            parameter; what it holds if left out.
        shard: Where the part lies; found out if left out.

    Attributes:
        leaf: Shape `(k,)`; its `grad` is the gradient of the trained values. What it holds itself
            does not matter. A DTensor over all parts where the parameter is one.
        num_whole: Number of selected weights in all parts.
        threshold: Of this parameter alone; None where there is one for all.
        average: Average of the trained values, `(k,)`, `dtype`, which is put out in their place; None where
            none is kept.
        rates: Codes of factors of the learning rate, see `weight_rates`, `(k,)`; None where all are 1.
        acting: What a quantised parameter acts with in place of its base values, `(k,)`; None for those.
    """

    def __init__(
        self,
        name: str,
        parameter: nn.Parameter,
        index: Tensor,
        base: Tensor | None = None,
        values: Tensor | None = None,
        shard: Shard | None = None,
    ):
        self.name = name
        self.parameter = parameter
        self.shard = Shard(parameter) if shard is None else shard
        self.num_whole = int(total(parameter, torch.tensor(len(index))))
        self._gaps = _gaps(index.to(learned_on(parameter)))
        self.is_quantised = isinstance(parameter, Quantised)
        self.acting: Tensor | None = None
        self.average: Tensor | None = None
        self.threshold: float | None = None
        self.rates: Tensor | None = None
        self.dtype = torch.promote_types(torch.float32, parameter.dtype)
        self._base = None
        if not self.is_quantised:
            self._base = self.gather(held(parameter)) if base is None else base
        self._is_apart = self.is_quantised or parameter.dtype != self.dtype
        self._values = values
        if values is None and self._is_apart:
            self._values = self._own(self.gather(held(parameter)), self.dtype)
        nothing = torch.zeros((), dtype=self.dtype, device=self._gaps.device)
        self.leaf = nn.Parameter(self._spread(nothing.expand(len(self._gaps))))

    def __len__(self) -> int:
        return len(self._gaps)

    @property
    def index(self) -> Tensor:
        """Sorted flat positions, `(k,)`, int32 (int64 for 2**31 weights or more); computed on each use."""
        return self.index_on(self._gaps.device)

    def index_on(self, device: torch.device) -> Tensor:
        """Return `index` on a device, to which only the gaps are sent."""
        gaps = send(self._gaps, device)
        return torch.cumsum(gaps, 0, dtype=index_dtype(self.parameter.numel()))

    def index_to_write(self) -> Tensor:
        """Return `index` as `take_update_` and `decay_` need it: nothing where the parameter is not written."""
        return self._gaps[:0] if self.is_quantised else self.index

    @property
    def base(self) -> Tensor:
        """Base values, `(k,)`, in the parameter's dtype."""
        if self._base is not None:
            return self._base
        return self._own(self.gather(self.parameter.unlearned()))  # type: ignore[attr-defined]

    @property
    def gradient(self) -> Tensor | None:
        """Gradient of the trained values, `(k,)`: what `leaf.grad` holds here."""
        return None if self.leaf.grad is None else held(self.leaf.grad)

    @gradient.setter
    def gradient(self, gradient: Tensor | None) -> None:
        self.leaf.grad = None if gradient is None else self._spread(gradient)

    def _spread(self, values: Tensor) -> Tensor:
        return self.shard.distributed(values, self.num_whole)

    def gather(self, dense: Tensor, index: Tensor | None = None) -> Tensor:
        """Read the selected positions of a tensor of the parameter's shape, `(k,)`, on its device."""
        if index is None:  # of a quantised parameter, what is trained may be kept elsewhere
            index = self.index_on(dense.device) if self.is_quantised else self.index
        return at_positions.read(dense, index)

    def _own(self, values: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Bring values to where those that are trained are kept."""
        return values.to(self._gaps.device, dtype or values.dtype)

    def gather_part(self, dense: Tensor, entries: slice, before: int) -> Tensor:
        """Read some of the selected positions of a dense part of the parameter's shape.

        Args:
            dense: Consecutive rows of the parameter, on any device.
            entries: Which of the selected weights lie in them.
            before: The last selected position before them, counted from where they begin.

        Returns:
            Shape `(len(entries),)`, on the device of `dense`.
        """
        gaps = send(self._gaps[entries], dense.device)
        return at_positions.read(dense, torch.cumsum(gaps, 0, dtype=torch.int64).add_(before))

    @property
    def trained(self) -> Tensor:
        """Trained values, `(k,)`, `dtype`; a copy where the parameter holds them."""
        return self.read(self.index)

    def read(self, index: Tensor) -> Tensor:
        """Return `trained`, given `index`."""
        if self._values is not None:
            return self._values
        self._refuse_other_parameter()
        return self.gather(held(self.parameter), index)

    def capture_gradient(self, parameter: Tensor) -> bool:
        """Move the parameter's dense gradient, at the selected positions, to `leaf.grad`, if it has one.

        The hook for `register_post_accumulate_grad_hook`: it runs once per backward pass as soon as
        this parameter's gradient is complete, so no two dense gradients need exist at a time.
        """
        gradient = parameter.grad
        if gradient is None:  # all of it went to the leaf already, see `convolution`
            return False
        parameter.grad = None
        refuse_other_division(self.name, parameter, gradient)
        gradient = held(gradient)
        if gradient.is_sparse:
            gradient = gradient.to_dense()
        if gradient.device != self._gaps.device and not self.is_quantised:
            raise RuntimeError(
                f"parameter {self.name!r} is on {gradient.device} but its selection on "
                f"{self._gaps.device}: the model was moved after SaraAdamW was made. Move the "
                "model first, then make the optimizer"
            )
        gathered = self._own(self.gather(gradient), self.dtype)
        if (sum_so_far := self.gradient) is None:
            self.gradient = gathered
        else:
            sum_so_far.add_(gathered)
        return True

    def update_target(self) -> Tensor:
        """Return what an optimizer is to change in place, `(k,)`, before `take_update_`.

        The trained values; zeros where the parameter holds those, so that they need not be read, or where
            they have rates of their own.
        """
        if self._values is not None and self.rates is None:
            return self._values
        return torch.zeros(len(self), dtype=self.dtype, device=self._gaps.device)

    @torch.no_grad()
    def take_update_(self, target: Tensor, index: Tensor) -> None:
        """Bring a changed `update_target` into the parameter, given `index`."""
        if self.rates is not None:
            for part, rates in zip(target.split(SOME), self.rates.split(SOME), strict=True):
                part.mul_(factors(rates))
        if self._values is None:
            self._put(target, index, accumulate=True)
        elif self.rates is None:
            self.write_(target, index)
        else:
            self.write_(self._values.add_(target), index)

    @torch.no_grad()
    def decay_(self, rate: float, index: Tensor) -> None:
        """Take a share of the learned change back, given `index`."""
        values, base = self.read(index), self.base.to(self.dtype)
        if self.rates is None:
            self.write_(values.lerp_(base, rate), index)
        else:
            share = factors(self.rates).mul_(rate).clamp_(max=1.0)
            self.write_(values.lerp_(base, share.to(self.dtype)), index)

    @torch.no_grad()
    def write_(self, values: Tensor, index: Tensor) -> None:
        """Put trained values into the parameter, rounded to its dtype, given `index`."""
        self._put(values, index)
        self._values = values if self._is_apart else None

    @torch.no_grad()
    def restore_(self) -> None:
        """Put the base values back into the parameter, bit for bit, and keep the trained ones.

        They are put back even if there is no memory to keep the trained ones, which raises. That takes hardly
        any memory, as some positions at a time are computed.
        """
        if self._base is None:
            self.acting = None
            return
        try:
            self.keep()
        finally:
            self._refuse_other_parameter()
            last, dense = self._gaps.new_zeros(1, dtype=torch.int64), held(self.parameter.data)
            for gaps, base in zip(self._gaps.split(SOME), self._base.split(SOME), strict=True):
                positions = torch.cumsum(gaps, 0, dtype=torch.int64).add_(last)
                at_positions.write_(dense, positions, base)
                last = positions[-1:]

    @torch.no_grad()
    def scale_(self, strength: float) -> None:
        """Put base + strength * (learned - base) into the parameter, and keep the trained values.

        Learned is the average, where one is kept, and else the trained values.
        """
        self.keep()
        base, learned = self.base.to(self.dtype), self.average
        learned = self.trained if learned is None else learned
        self._put(base + strength * (learned - base), self.index)

    def keep(self) -> None:
        """Hold the trained values, whatever happens to the parameter from now on."""
        self._values = self.trained

    def _put(self, values: Tensor, index: Tensor, accumulate: bool = False) -> None:
        self._refuse_other_parameter()
        if self.is_quantised:
            self.acting = values
            return
        values = values.detach().to(self.parameter.dtype)
        at_positions.write_(held(self.parameter.data), index, values, accumulate)

    def _refuse_other_parameter(self) -> None:
        base = self._base
        if base is None:
            return
        if self.parameter.dtype != base.dtype or self.parameter.device != base.device:
            raise RuntimeError(
                f"parameter {self.name!r} is now {self.parameter.dtype} on "
                f"{self.parameter.device}, but was {base.dtype} on {base.device} when "
                "SaraAdamW was made. Convert or move the model first, then make the optimizer"
            )

    def record(self) -> dict:
        """Return selection, base, trained and average values and rates of all parts as tensors and plain values."""
        of_all = {"base": self.base, "values": self.trained}
        of_all |= {"average": self.average} if self.average is not None else {}
        of_all |= {"rates": self.rates} if self.rates is not None else {}
        found = {key: self.shard.whole(of_part)[0] for key, of_part in of_all.items()}
        if self.shard.is_part:  # more than this device may have room for
            found = {key: whole.cpu() for key, whole in found.items()}
        return {
            "name": self.name,
            "shape": self.shard.shape,
            "index": self.shard.whole(self.shard.in_whole(self.index))[0].cpu(),
            **found,
            **({} if self.threshold is None else {"threshold": self.threshold}),
        }

    def part(self, marked: Tensor) -> "SparseWeight":
        """Copy the entries marked, bool `(k,)`, with their gradient."""
        values = None if self._values is None else self._values[marked]
        base = None if self._base is None else self._base[marked]
        part = SparseWeight(self.name, self.parameter, self.index[marked], base, values, self.shard)
        part.acting = None if self.acting is None else part.trained
        part.threshold = self.threshold
        part.average = None if self.average is None else self.average[marked]
        part.rates = None if self.rates is None else self.rates[marked]
        if (gradient := self.gradient) is not None:
            part.gradient = gradient[marked]
        return part


def _gaps(index: Tensor) -> Tensor:
    gaps = torch.diff(index.long(), prepend=index.new_zeros(1, dtype=torch.int64))
    largest = int(gaps.max()) if len(gaps) else 0
    fitting = (dtype for dtype in GAP_DTYPES if largest <= torch.iinfo(dtype).max)
    return gaps.to(next(fitting, torch.int64))
