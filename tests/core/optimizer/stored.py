"""Small models with their matrices stored in few bits, and the same with the numbers those stand for."""

import copy

import torch
from torch import nn

from ..helpers import Net, loss_of

OPTIONS = {"fraction": 0.2, "lr": 1e-2, "zeros": "train", "low_rank_weight": 1e-2}


def as_float(stored):
    return stored.float()


def scaled(dtype, largest):
    def store(weight):
        scale = weight.detach().abs().max() / largest
        stored = weight.detach() / scale
        stored = stored.round() if dtype == torch.int8 else stored
        return stored.to(dtype), lambda stored: stored.float() * scale

    return store


FORMS = {
    "float32": lambda w: (w.detach().clone(), torch.detach),
    "float8_e4m3fn": lambda w: (w.detach().to(torch.float8_e4m3fn), as_float),
    "float8_e5m2": lambda w: (w.detach().to(torch.float8_e5m2), as_float),
    "scaled float8": scaled(torch.float8_e4m3fn, 448),
    "scaled int8": scaled(torch.int8, 127),
    "float16": lambda w: (w.detach().half(), lambda stored: stored),
}


def stored_and_wide(form, dtype=torch.float32, net=None):
    """A model with its matrices stored in a form, what makes numbers of them, and one made of those."""
    small = Net() if net is None else net
    wide, converters = copy.deepcopy(small).to(dtype), {}
    for path, module in small.named_modules():
        for name, weight in list(module._parameters.items()):
            if weight is None or weight.dim() < 2:
                continue
            stored, convert = FORMS[form](weight)
            full_name = f"{path}.{name}" if path else name
            converters[full_name] = convert
            module._parameters[name] = nn.Parameter(stored, requires_grad=False)
            wide.get_submodule(path)._parameters[name] = nn.Parameter(
                convert(stored).to(dtype, copy=True)
            )
    for name, parameter in small.named_parameters():
        if name not in converters:
            parameter.data = parameter.data.to(dtype)
    return small, converters, wide


def bytes_of(net):
    return {n: p.detach().clone().view(torch.uint8) for n, p in net.named_parameters()}


def require_gradients(net):
    for parameter in net.parameters():
        parameter.requires_grad_(True)


def learn(optimizer, net, steps, loss=loss_of, first=0):
    for seed in range(first, first + steps):
        loss(net, seed).backward()
        optimizer.step()
        optimizer.zero_grad()


def assert_same_delta(found, expected):
    assert found.entries.keys() == expected.entries.keys()
    for name, entry in expected.entries.items():
        assert torch.equal(found.entries[name].index, entry.index), name
        assert torch.equal(found.entries[name].values, entry.values), name
