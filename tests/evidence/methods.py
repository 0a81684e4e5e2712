"""Ways to fine-tune a model: each returns an optimizer, and adds what it trains to the model in place."""

import contextlib
import os
import sys
from functools import partial
from unittest import mock

import torch
from torch import nn
from torch.nn.utils import parametrize

from sara_core import SaraAdamW
from sara_core.optimizer import sara_adamw
from sara_core.weights.selection import Selection

from .chosen import positions_of
from .variants import ByLayerSize, Equalised, LowRankChange, Reselecting


def sara(
    model, rate, fraction=0.1, low_rank_weight=5e-4, kind=SaraAdamW, by_parameter=False, **options
):
    """SaRA; `rate=None` takes the paper's rule."""
    return kind(
        model,
        fraction=fraction,
        lr=rate,
        low_rank_weight=low_rank_weight,
        max_grad_norm=1.0,
        by_parameter=by_parameter,
        **options,
    )


def by_gradient(model, rate, selection, seed=0):
    """SaRA with weights that were chosen by `select_by_gradient`."""
    return sara(model, rate, None, by_parameter=None, selection=selection, seed=seed)


def masked(
    model,
    rate,
    chosen,
    fraction=0.1,
    among=0.3,
    gradients=None,
    by_layer_size=False,
    equalised=False,
    **options,
):
    """The same optimizer with weights chosen otherwise, and without progressive adjustment unless asked for.

    Weights whose input is always zero are left out: emoji64 has such, of a size that SaRA does not select
    either.

    Args:
        model: The model.
        rate: Learning rate.
        chosen: `random`; `largest`; `layer`, the smallest of each layer; `gradient`, those with the largest
            gradient; `small gradient`, those of the smallest with the largest gradient; both also after
            `layer`, of each layer alone; `layer mean gradient`, where it is the size of the mean over
            batches; `rows`, whole rows with the smallest weights; `blocks`, squares of 4 with the smallest;
            `smallest`.
        fraction: Share that trains.
        among: Share that counts as the smallest.
        gradients: Size of each weight's gradient by parameter name, where it is gone by.
        by_layer_size: Take a rate for each layer that goes with the spread of its weights.
        equalised: Make updates as Muon does.
        options: Of `sara`.
    """

    limit = None

    def choose(parameters, **rule):
        nonlocal limit
        seed = options.get("seed", 0)
        index, limit = positions_of(parameters, chosen, fraction, among, gradients, seed)
        return Selection(
            float(limit or 1.0), index, sum(p.numel() for p in parameters.values()), 0, False
        )

    kind = ByLayerSize if by_layer_size else Equalised if equalised else SaraAdamW
    with mock.patch.object(sara_adamw, "select", choose):
        return sara(model, rate, fraction, kind=kind, **options)


def authors(model, rate, fraction=0.1, seed=0):
    """The authors' optimizer with their defaults, from a checkout of their repository, `SARA_OFFICIAL`.

    It fails where it re-selects, so it never does; its low-rank loss has no effect.
    """
    if "SARA_OFFICIAL" not in os.environ:
        raise LookupError("set SARA_OFFICIAL to a checkout of github.com/sjtuplayer/SaRA")
    sys.path.insert(0, os.environ["SARA_OFFICIAL"])
    from optim.adamw import AdamW

    size = torch.cat([p.detach().abs().flatten() for p in model.parameters() if p.dim() > 1])
    threshold = float(size.sort().values[round(fraction * len(size))])
    return _clipped(AdamW)(model, lr=rate, threshold=threshold, progressive_iter=10**9)


def low_rank_on_mask(model, rate, rank=8, chosen="layer", fraction=0.1, seed=0):
    """Train a product of two thin matrices for each layer, of which only the chosen weights take part."""
    chosen_from = {n: p for n, p in model.named_parameters() if p.dim() > 1}
    index, _ = positions_of(chosen_from, chosen, fraction)
    model.requires_grad_(False)
    generator, trained = torch.Generator().manual_seed(seed), []
    for path, module in list(model.named_modules()):
        if isinstance(module, (nn.Linear, nn.Conv2d)) and f"{path}.weight" in index:
            part = _OnMask(module.weight, index[f"{path}.weight"], rank, generator)
            parametrize.register_parametrization(module, "weight", part)
            trained += [part.out, part.inner]
    return adamw(trained, rate)


class _OnMask(nn.Module):
    """Adds (out @ inner) * mask to a weight; begins as LoRA does."""

    def __init__(self, weight, positions, rank, generator):
        super().__init__()
        mask = torch.zeros(weight.numel())
        mask[positions.long()] = 1.0
        self.register_buffer("mask", mask.view_as(weight), persistent=False)
        columns = weight[0].numel()
        bound = columns**-0.5
        inner = torch.empty(rank, columns).uniform_(-bound, bound, generator=generator)
        self.inner, self.out = nn.Parameter(inner), nn.Parameter(torch.zeros(len(weight), rank))

    def forward(self, weight):
        return weight + self.mask * (self.out @ self.inner).view_as(weight)


def full(model, rate):
    """Every weight."""
    return adamw(list(model.parameters()), rate)


def lora(model, rate, rank=8, seed=0):
    """LoRA on all linear layers and convolutions, alpha as large as the rank, by PEFT."""
    from peft import LoraConfig

    return _peft(
        model, rate, LoraConfig(r=rank, lora_alpha=rank, target_modules=_layers(model)), seed
    )


def shira(model, rate, rank=8, seed=0):
    """SHiRA: a random sparse mask on each linear layer, as many values as a LoRA of that rank, by PEFT."""
    from peft import ShiraConfig

    return _peft(model, rate, ShiraConfig(r=rank, target_modules=_layers(model, nn.Linear)), seed)


def _layers(model, kinds=(nn.Linear, nn.Conv2d)):
    return [name for name, module in model.named_modules() if isinstance(module, kinds)]


def _peft(model, rate, config, seed):
    from peft import inject_adapter_in_model

    model.requires_grad_(False)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model)
    return adamw([p for p in model.parameters() if p.requires_grad], rate)


def _clipped(kind):
    """A kind of optimizer that clips gradients as the others do."""

    class Clipped(kind):
        def step(self):
            nn.utils.clip_grad_norm_(self.param_groups[0]["params"], 1.0)
            super().step()

    return Clipped


def adamw(parameters, rate):
    """The optimizer of all other methods."""
    return _clipped(torch.optim.AdamW)(parameters, rate, weight_decay=0.0)


METHODS = {
    "sara": sara, "by gradient": by_gradient, "masked": masked, "low rank on mask": low_rank_on_mask, "full": full, "lora": lora,
    "shira": shira, "authors": authors, "low-rank change": partial(sara, kind=LowRankChange),
    "reselecting": partial(sara, kind=Reselecting),
}  # fmt: skip


class Average:
    """Keeps an exponential average of what is trained, as PEFT's or SaRA's parameters hold it.

    Args:
        model: The model.
        decay: Of the average, at most; it begins lower, so that the start is forgotten.
    """

    def __init__(self, model, decay):
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.mean = [p.detach().clone() for p in self.trained]
        self.decay, self.steps = decay, 0

    @torch.no_grad()
    def add(self):
        """Take in what a step has made."""
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        torch._foreach_lerp_(self.mean, self.trained, 1 - decay)

    @torch.no_grad()
    def put(self):
        """Have the model hold the average."""
        torch._foreach_copy_(self.trained, self.mean)


def num_trained(optimizer):
    """How many numbers are trained."""
    return sum(p.numel() for group in optimizer.param_groups for p in group["params"])


@torch.no_grad()
def learned_weights(model, names):
    """The weights a fine-tuned model acts with, by the names of the model before it was trained."""
    layers = {name: m for name, m in model.named_modules() if hasattr(m, "get_base_layer")}
    found = {}
    for layer in layers.values():
        if hasattr(layer, "merge"):
            layer.merge()
    for module in model.modules():
        if parametrize.is_parametrized(module, "weight"):
            parametrize.remove_parametrizations(module, "weight")
    state = model.state_dict()
    for name in names:
        layer, _, part = name.rpartition(".")
        key = f"{layer}.base_layer.{part}" if layer in layers else name
        found[name] = state[key].clone()
    return found


@contextlib.contextmanager
def between(model, base, learned, strength):
    """Have a model hold base + strength * (learned - base) for a while."""
    state = model.state_dict()
    with torch.no_grad():
        for name, value in learned.items():
            state[name].copy_(torch.lerp(base[name], value, strength))
    yield model
    with torch.no_grad():
        for name, value in base.items():
            state[name].copy_(value)
