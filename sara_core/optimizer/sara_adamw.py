"""AdamW over the smallest weights of a model: SaRA in one line of an ordinary training script."""

import contextlib
import logging
import math
from collections.abc import Iterable
from contextlib import AbstractContextManager
from functools import partial

import torch
from torch import Tensor, nn

from ..delta.sparse_delta import SparseDelta
from ..weights.fingerprint import take_fingerprint
from ..weights.parameters import choose_parameters, refuse_untrainable_dtypes
from ..weights.selection import Selection, refuse_unfitting, select
from ..weights.shards import refuse_other_divisions, reshard
from . import adam_moments, learning_rate, packages
from .average import follow_, refuse_bad_decay
from .data_parallel import GradientAverage, is_shared, refuse_differences, refuse_wrapped
from .layer_rates import Rates, rates_of
from .low_rank import add_gradient_
from .saved_state import PLAIN, checked, format_of, moments_by_place
from .sparse_model import SparseModel
from .take_over import take_over_delta, take_over_weights
from .trained_model import TrainedModel
from .updates import AdamWUpdates, clip_, moments_of_all, refuse_bad_options

logger = logging.getLogger("comfyui-sara")

LOW_RANK_WEIGHT = 5e-4  # measured in docs/low-rank.md


class SaraAdamW(TrainedModel, torch.optim.Optimizer):
    """Train only the weights of `model` that lie closer to zero than a threshold, with AdamW.

    Replaces `torch.optim.AdamW(model.parameters())`. Exactly one of `threshold`, `fraction`,
    `num_trainable` and `selection` says which weights train; all others stay bit-identical. The model keeps its
    parameters: each selected one sheds its dense gradient as soon as backward has made it
    (unstructural backpropagation, eq. 6-7 of the paper), and only the selected entries go on to a
    flat float32 gradient. `param_groups` and `parameters()` hold the leaves of these gradients; clip
    those, not the model's parameters.

    Weight decay pulls the learned change towards zero, not the weight, which is small already.

    Making the optimizer sets `requires_grad=False` on parameters it does not train and drops
    gradients the model already holds; `restore` and `detach` give `requires_grad` back. Gradients
    are cleared by `optimizer.zero_grad()`; `model.zero_grad()` does not reach them.

    A model that `torch.distributed.fsdp.fully_shard` has divided trains as the whole would: each process
    keeps what belongs to its own rows. `delta`, `state_dict`, `load_state_dict` and `start_from` take all
    of its processes then.

    Args:
        model: Any module, on the device and in the dtype it will train in. Parameters with
            requires_grad=False are never trained.
        threshold: Absolute weight value; weights with `|w| < threshold` train.
        fraction: Share of each chosen parameter's weights that trains, in `(0, 1]`; see `by_parameter`.
        num_trainable: Number of weights that train, such as 5000000 or "5M".
        selection: Weights that train, chosen otherwise, such as by `select_by_gradient`.
        lr: Learning rate; by default `learning_rate.rule_of_share(fraction)` where each parameter gives its
            share, `rule_of_gradient` for a selection without thresholds, and else `rule(threshold)`. Of Prodigy it is a factor of the rate
            that it finds by itself, by default 1.
        betas: Decay rates of the two moments.
        eps: Added to the root of the second moment.
        weight_decay: Share of the learned change taken back per step and unit of lr.
        low_rank_weight: Weight of the nuclear norm of the trained values on their mask; 0 is off.
        low_rank_matrices: Matrices drawn per step for it, without replacement.
        progressive_step: Number of steps after which only the trained weights still under the
            threshold go on (half of the run in the paper); 0 is off.
        moments: How AdamW's two moments are kept: "fp32", or "8bit", which takes 2 bytes a trained
            weight instead of 8 and needs torchao.
        ema_decay: Decay of an exponential average of the trained values, in `[0, 1)`; 0 keeps none. With
            one, `delta` and `at_strength` go by the average; it takes 4 bytes a trained weight.
        optimizer: Which one makes the updates: "adamw", which is torch's; "prodigy" (Mishchenko and Defazio
            2023, arXiv:2306.06101), which finds its rate by itself, from the package prodigyopt; or
            "schedule_free" (Defazio et al. 2024, arXiv:2405.15682), which is for a constant rate and puts
            out an average, from the package schedulefree. They keep 16 and 12 bytes a trained weight.
        rates: Factors of the learning rate by patterns of parameter names, see `layer_rates.rates_of`.
        max_grad_norm: Gradients of a larger norm are scaled down to it in each step; 0 is off. The
            model's own parameters have none that `clip_grad_norm_` could find.
        include: Only parameters in whose name one of these patterns occurs.
        exclude: No parameters in whose name one of these patterns occurs.
        biases_and_norms: Also select among parameters of fewer than two dimensions.
        zeros: How exact zeros are treated, see `selection.select`.
        by_parameter: Select the smallest weights of each parameter, `fraction` of them, by a threshold of
            its own, instead of the smallest of the whole model, as the paper does; by default where a
            `fraction` is given.
        seed: Seed of the draws for the low-rank term.
        distributed: Average gradients over processes where torch.distributed is initialised. False
            trains in this one alone.
        process_group: Processes over which they are averaged; by default all of them.
        communication_dtype: Of the gradients they send; float32 by default.
        accumulation_steps: Backward passes per update; processes send after the last one only.
        overlap: Send gradients while backward goes on, which hides some of the sending behind it. At
            its end the host waits for the averages.

    Raises:
        ValueError: Arguments out of range, nothing to train, a base with NaN, or processes that do
            not train the same, or weights divided in another way than by rows; rates, an average of
            one's own, moments in 8 bits or divided weights with another optimizer than AdamW.
        TypeError: A chosen parameter has a dtype that cannot be trained in place (float8), or the
            model is wrapped in DistributedDataParallel or FullyShardedDataParallel.
        ImportError: Moments in 8 bits without torchao, or another optimizer without its package.

    Source: Hu et al. 2024, arXiv:2409.06633, sections 4.1-4.4.
    """

    def __init__(
        self,
        model: nn.Module,
        threshold: float | None = None,
        *,
        fraction: float | None = None,
        num_trainable: int | str | None = None,
        selection: Selection | None = None,
        lr: float | None = None,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        low_rank_weight: float = LOW_RANK_WEIGHT,
        low_rank_matrices: int = 1,
        progressive_step: int = 0,
        moments: str = "fp32",
        ema_decay: float = 0.0,
        optimizer: str = packages.ADAMW,
        rates: Rates | None = None,
        max_grad_norm: float = 0.0,
        include: str | Iterable[str] | None = None,
        exclude: str | Iterable[str] | None = None,
        biases_and_norms: bool = False,
        zeros: str = "auto",
        by_parameter: bool | None = None,
        seed: int = 0,
        distributed: bool = True,
        process_group: "torch.distributed.ProcessGroup | None" = None,
        communication_dtype: torch.dtype | None = None,
        accumulation_steps: int = 1,
        overlap: bool = False,
    ):
        refuse_bad_options(
            betas, lr=lr or 0, eps=eps, weight_decay=weight_decay, low_rank_weight=low_rank_weight,
            low_rank_matrices=low_rank_matrices, progressive_step=progressive_step,
            max_grad_norm=max_grad_norm,
        )  # fmt: skip
        refuse_bad_decay(ema_decay)
        adam_moments.refuse_unusable(moments)
        packages.refuse_unusable(optimizer)
        packages.refuse_bad_rates(optimizer, lr, betas, eps)
        packages.refuse_beside_package(
            optimizer, moments=moments, ema_decay=ema_decay, rates=rates,
            **{"selection.weight_rates": selection is not None and bool(selection.weight_rates)},
        )  # fmt: skip
        refuse_wrapped(model)
        reshard(model)
        parameters = choose_parameters(model, include, exclude, biases_and_norms)
        refuse_untrainable_dtypes(parameters)
        refuse_other_divisions(model, parameters)
        packages.refuse_divided(optimizer, parameters)
        if selection is None:
            selection = select(
                parameters,
                threshold=threshold,
                fraction=fraction,
                num_trainable=num_trainable,
                zeros=zeros,
                by_parameter=by_parameter,
            )
        else:
            refuse_unfitting(
                selection, parameters, threshold=threshold, fraction=fraction,
                num_trainable=num_trainable, by_parameter=by_parameter,
            )  # fmt: skip

        self.threshold = selection.threshold
        self.zeros_skipped = selection.zeros_skipped
        self.num_considered = selection.num_considered
        self.low_rank_weight = low_rank_weight
        self.low_rank_matrices = low_rank_matrices
        self.progressive_step = progressive_step
        self.moments = moments
        self.ema_decay = ema_decay
        self.optimizer = optimizer
        self.rates = rates_of(selection.index, rates)
        self.max_grad_norm = max_grad_norm
        self.num_steps = 0
        self.stage = 1
        self.low_rank_loss: Tensor | None = None
        self._low_rank_added = self._has_updated = False
        self.generator = torch.Generator().manual_seed(seed)
        self.fingerprint = take_fingerprint(parameters, selection.index)
        self._weights = SparseModel(
            model, selection.index, selection.own_thresholds, selection.weight_rates
        )
        if lr is None:
            lr = self._default_rate(fraction)
        self._average = None
        if distributed and is_shared(process_group):
            facts = {
                "trained weights": self.num_trainable, "threshold": self.threshold, "lr": lr, "seed": seed,
                "own thresholds": selection.own_thresholds,
                "communication_dtype": str(communication_dtype), "overlap": overlap,
                "accumulation_steps": accumulation_steps, "optimizer": optimizer, "rates": self.rates,
            }  # fmt: skip
            refuse_differences({**facts, "base": self.fingerprint}, process_group)
            self._average = GradientAverage(
                lambda: self._weights.averaged,
                process_group,
                communication_dtype,
                accumulation_steps,
                overlap,
            )
            self._weights.share(self._average.arrived)
        options = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(self.parameters(), options)
        self._updates: AdamWUpdates | packages.PackageUpdates = (
            AdamWUpdates(moments, self.rates)
            if optimizer == packages.ADAMW
            else packages.PackageUpdates(optimizer, self.parameters(), options)
        )
        self._updates.share(self)

    def _default_rate(self, fraction: float | None) -> float:
        if self.optimizer == packages.PRODIGY:
            return 1.0
        if self.threshold == math.inf:
            return learning_rate.rule_of_gradient(self.num_trainable / self.num_considered)
        if self._weights.active[0].threshold is not None:
            share = fraction or self.num_trainable / self.num_considered
            return learning_rate.rule_of_share(share)
        return learning_rate.rule(self.threshold)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients of the trained values."""
        self._low_rank_added = False
        if self._average is not None:
            self._average.forget()
        super().zero_grad(set_to_none)

    @property
    def distributed(self) -> bool:
        """Whether gradients are averaged over processes."""
        return self._average is not None

    def no_sync(self) -> AbstractContextManager[None]:
        """Return a context in which backward passes add up gradients without sending them."""
        return contextlib.nullcontext() if self._average is None else self._average.held()

    def average_gradients(self) -> None:
        """Average the gradients over all processes, if that has not been done at the end of backward.

        `step` does this by itself; call it in a process that makes no backward pass for this update.
        """
        if self._average is not None:
            self._average.finish()

    @torch.no_grad()
    def add_low_rank_gradient_(self) -> None:
        """Add the low-rank term's gradient to that of one drawn matrix (or as many as set).

        `step` does this by itself; call it earlier, after unscaling, to have it clipped too.
        Matrices that got no gradient in this step are not drawn. The value of the term, summed over
        the drawn matrices, is left in `low_rank_loss`.
        """
        if self._low_rank_added or not self.low_rank_weight:
            return
        self._low_rank_added = True
        self.low_rank_loss = add_gradient_(
            self._weights.active, self.low_rank_weight, self.low_rank_matrices, self.generator
        )

    @torch.no_grad()
    def step(self, closure=None):
        """Update the trained values, write them into the model and re-select when it is time.

        Args:
            closure: As in torch: evaluates the model and returns the loss.
        """
        if not self._weights.attached:
            raise RuntimeError("this optimizer was detached from its model; make a new SaraAdamW")
        with torch.enable_grad():
            loss = None if closure is None else closure()
        self.average_gradients()
        self.add_low_rank_gradient_()
        if self.max_grad_norm:
            clip_(self.parameters(), self.max_grad_norm)
        if any(leaf.grad is None for leaf in self.parameters()) and not self._has_updated:
            self._weights.refuse_replaced()
            self._weights.tell_of_those_without_gradient()
        self._has_updated = True
        self._updates.update_(
            self._weights.active, self.state, self.param_groups[0], self.num_steps
        )
        self._low_rank_added = False
        if self._average is not None:
            self._average.forget()
        self.num_steps += 1
        if self.ema_decay:
            follow_(self._weights.every, self.ema_decay, self.num_steps)
        if self.num_steps == self.progressive_step:
            for leaf in self.parameters():
                leaf.grad = None  # used, and not worth handing on
            self.reselect()
        return loss

    @property
    def rate_in_use(self) -> float:
        """Learning rate of the last update: that of the group, times what Prodigy has found."""
        group = self.param_groups[0]
        return group["lr"] * group.get("d", 1.0)

    @property
    def has_weight_rates(self) -> bool:
        """Whether single weights have rates of their own."""
        return any(weight.rates is not None for weight in self._weights.active)

    @property
    def has_average(self) -> bool:
        """Whether an average of the trained values is kept, which is what is learned."""
        return bool(self.ema_decay) or self.optimizer == packages.SCHEDULE_FREE

    @torch.no_grad()
    def reselect(self) -> None:
        """Go on with the trained weights still under the threshold; freeze the others as learned.

        Moments and pending gradients of those that go on are kept (progressive parameter
        adjustment, section 4.3 of the paper). If none is left under the threshold, all go on and a
        warning says so. `step` calls this by itself at `progressive_step`.
        """
        num_before = self.num_trainable
        marks, num_left = self._weights.marks_below(self.threshold)
        if not num_left:
            logger.warning(
                "progressive adjustment skipped: all %d trained weights have left their threshold, so "
                "none would go on. A lower learning rate or progressive_step=0 avoids this",
                num_before,
            )
            return
        self._weights.freeze(marks, partial(self._updates.keep, self.state))
        self.param_groups[0]["params"] = self.parameters()
        self.stage = 2
        logger.info("progressive adjustment: %d of %d trained weights go on", num_left, num_before)

    @torch.no_grad()
    def start_from(self, delta: SparseDelta, num_steps: int = 0) -> None:
        """Go on from what a delta has learned on this base, with new moments.

        Args:
            delta: Learned from the weights that are selected here.
            num_steps: Steps it took; beyond `progressive_step` only weights that are still below
                the threshold train on.

        Raises:
            ValueError: Another base, or weights that are not selected; nothing has been changed then.
        """
        if self.num_steps:
            raise ValueError(f"{self.num_steps} steps are made already; start from a new SaraAdamW")
        take_over_delta(self._weights, delta)
        self.num_steps = num_steps
        if 0 < self.progressive_step <= num_steps:
            self.reselect()

    def state_dict(self) -> dict:
        """Return everything a reloaded run needs to continue exactly; tensors and plain values."""
        own = {
            **format_of(self.optimizer, self.moments),
            **{name: getattr(self, name) for name in PLAIN},
            "generator": self.generator.get_state(),
            "weights": self._weights.state(),
        }
        found = super().state_dict()
        found["state"] = moments_of_all(found["state"], self._weights.active)
        return {**found, "sara": own}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict) -> None:
        """Continue a saved run: its selection, trained values, moments, stage and random state.

        The model may hold the base weights or the trained ones; its unselected weights must be
        those of the saved run. Weights this optimizer itself has changed are put back first. Moments
        saved in the other precision are converted.

        Args:
            state_dict: What `state_dict` returned. Not modified.

        Raises:
            ValueError: Not a state of this optimizer, or it does not fit the model; nothing has
                been changed then.
            ImportError: Its moments are in 8 bits, and torchao is missing; the same holds.
        """
        saved = checked(state_dict, self.optimizer)
        taken = take_over_weights(
            self._weights, saved["weights"], saved["fingerprint"], self.has_average
        )
        self.state.clear()
        self.param_groups[0]["params"] = self.parameters()
        super().load_state_dict({"state": {}, "param_groups": state_dict["param_groups"]})
        self._updates.share(self)
        self._updates.take_over(
            self.state, self._weights.active, taken, moments_by_place(state_dict)
        )
        for name in PLAIN:
            setattr(self, name, saved[name])
        self.generator.set_state(saved["generator"].cpu())
        self._low_rank_added = False
