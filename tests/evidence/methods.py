"""Ways to fine-tune a model: each returns an optimizer, and adds what it trains to the model in place."""

import contextlib
from unittest import mock

import torch
from torch import nn

from sara_core import SaraAdamW
from sara_core.optimizer import sara_adamw
from sara_core.weights.selection import Selection

WORDS, UNUSED = 768, 0.25  # columns that the text fills, and the size of weights behind the others


def sara(model, rate, fraction=0.1, low_rank_weight=5e-4, **options):
    """SaRA; `rate=None` takes the paper's rule."""
    return SaraAdamW(
        model, fraction=fraction, lr=rate, low_rank_weight=low_rank_weight, max_grad_norm=1.0,
        **options,
    )  # fmt: skip


def masked(model, rate, chosen, fraction=0.1, among=0.3, gradients=None, **options):
    """The same optimizer with weights chosen otherwise, and without progressive adjustment unless asked for.

    Weights whose input is always zero are left out: emoji64 has such, of a size that SaRA does not select
    either.

    Args:
        model: The model.
        rate: Learning rate.
        chosen: `random`; `largest`; `layer`, the smallest of each layer; `gradient`, those with the largest
            gradient; `small gradient`, those of the smallest with the largest gradient; `rows`, whole rows
            with the smallest weights.
        fraction: Share that trains.
        among: Share that counts as the smallest.
        gradients: Mean size of each weight's gradient by parameter name, where it is gone by.
        options: Of `sara`.
    """

    def choose(parameters, **rule):
        size = torch.cat([p.detach().abs().flatten() for p in parameters.values()])
        limit = size.kthvalue(round(among * len(size))).values if "small" in chosen else None
        keys = {
            name: _keys(p, chosen, number, gradients and gradients[name], limit)
            for number, (name, p) in enumerate(parameters.items())
        }
        count = round(fraction * len(size))
        cut = torch.cat(list(keys.values())).kthvalue(count).values
        index = {name: (key <= cut).nonzero()[:, 0].int() for name, key in keys.items()}
        index = {name: positions for name, positions in index.items() if len(positions)}
        return Selection(float(limit or 1.0), index, len(size), 0, False)

    with mock.patch.object(sara_adamw, "select", choose):
        return sara(model, rate, fraction, **options)


def _keys(parameter, chosen, number, gradient, limit):
    """What is smaller for weights that are chosen first, (n,)."""
    size = parameter.detach().abs()
    if chosen == "random":
        key = torch.rand(parameter.shape, generator=torch.Generator().manual_seed(number))
    elif chosen == "largest":
        key = -size
    elif chosen == "layer":
        key = size.flatten().argsort().argsort().view_as(size) / size.numel()
    elif chosen == "rows":
        key = size.flatten(1).square().mean(1).view(-1, *[1] * (size.dim() - 1)).expand_as(size)
        key = key.clone()
    else:
        key = -gradient
        if limit is not None:
            key = key.masked_fill(size > limit, torch.inf)
    if parameter.dim() == 2 and parameter.shape[1] > WORDS:
        unused = parameter.detach()[:, WORDS:].abs() == UNUSED
        key[:, WORDS:][unused] = torch.inf
    return key.flatten()


def full(model, rate):
    """Every weight."""
    return _adamw(list(model.parameters()), rate)


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
    return _adamw([p for p in model.parameters() if p.requires_grad], rate)


class _ClippedAdamW(torch.optim.AdamW):
    def step(self):
        nn.utils.clip_grad_norm_(self.param_groups[0]["params"], 1.0)
        super().step()


def _adamw(parameters, rate):
    return _ClippedAdamW(parameters, rate, weight_decay=0.0)


METHODS = {"sara": sara, "masked": masked, "full": full, "lora": lora, "shira": shira}


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
