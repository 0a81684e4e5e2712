"""Ways to fine-tune a model: each returns an optimizer, and adds what it trains to the model in place."""

import contextlib
from unittest import mock

import torch
from torch import nn

from sara_core import SaraAdamW
from sara_core.optimizer import sara_adamw
from sara_core.weights.selection import Selection

WORDS, UNUSED = 768, 0.25  # columns that the text fills, and the size of weights behind the others


def sara(model, rate, fraction=0.1, progressive_step=0, low_rank_weight=5e-4, **options):
    """SaRA; `rate=None` takes the paper's rule."""
    return SaraAdamW(
        model, fraction=fraction, lr=rate, progressive_step=progressive_step,
        low_rank_weight=low_rank_weight, max_grad_norm=1.0, **options,
    )  # fmt: skip


def masked(model, rate, chosen, fraction=0.1, **options):
    """The same optimizer with other weights than the smallest: `chosen` is `random` or `largest`.

    Without progressive adjustment, which goes by the smallest, and without weights whose input is always
    zero: emoji64 has such, of a size that SaRA does not select either.
    """

    def choose(parameters, **rule):
        count = round(fraction * sum(p.numel() for p in parameters.values()))
        keys = {
            name: _keys(p, chosen, number) for number, (name, p) in enumerate(parameters.items())
        }
        cut = torch.cat(list(keys.values())).kthvalue(count).values
        index = {name: (key <= cut).nonzero()[:, 0].int() for name, key in keys.items()}
        index = {name: positions for name, positions in index.items() if len(positions)}
        return Selection(1.0, index, sum(p.numel() for p in parameters.values()), 0, False)

    with mock.patch.object(sara_adamw, "select", choose):
        return sara(model, rate, fraction, **options)


def _keys(parameter, chosen, number):
    if chosen == "largest":
        key = -parameter.detach().abs()
    else:
        generator = torch.Generator().manual_seed(number)
        key = torch.rand(parameter.shape, generator=generator)
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
