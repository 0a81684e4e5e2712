"""Small models, and a dense reference of SaRA written independently of the core."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils import backend_registration

from sara_core import SaraAdamW

ROOT = Path(__file__).resolve().parents[2]
THRESHOLD, LR = 0.05, 1e-2


class Net(nn.Module):
    """A convolution, an embedding, two linear layers, a norm and an unused layer."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.conv = nn.Conv2d(3, 8, 3)
        self.table = nn.Embedding(7, 12)
        self.first = nn.Linear(8 * 4 + 12, 80)
        self.norm = nn.LayerNorm(80)
        self.last = nn.Linear(80, 70)
        self.unused = nn.Linear(5, 5)

    def forward(self, picture, word):
        x = torch.tanh(self.conv(picture)).flatten(1)[:, :32]
        x = torch.cat([x, self.table(word).to(x.dtype)], dim=1)
        return self.last(torch.tanh(self.norm(self.first(x))))


def sample(seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    picture = torch.randn(4, 3, 4, 4, generator=generator).to(dtype)
    word = torch.randint(0, 7, (4,), generator=generator)
    return picture, word


def loss_of(net, seed):
    dtype = net.first.weight.dtype
    return net(*sample(seed, dtype)).float().square().mean()


class DenseReference:
    """SaRA by masking: torch's AdamW on whole float32 copies, gradients of others set to zero.

    Keeps a float32 master of every weight and copies it, rounded, into the model where the mask
    is set; nothing here is shared with the core.
    """

    def __init__(self, net, threshold, lr, min_dims=2, decay=0.0):
        self.net = net
        self.names = [n for n, p in net.named_parameters() if p.dim() >= min_dims]
        params = dict(net.named_parameters())
        self.params = [params[n] for n in self.names]
        self.base = [p.detach().clone() for p in self.params]
        self.masters = [nn.Parameter(b.to(torch.float32, copy=True)) for b in self.base]
        self.masks = [b.float().abs() < threshold for b in self.base]
        self.adamw = torch.optim.AdamW(self.masters, lr=lr, weight_decay=0.0)
        self.threshold, self.lr, self.decay = threshold, lr, decay

    def backward(self, loss):
        loss.backward()
        for param, master, mask in zip(self.params, self.masters, self.masks, strict=True):
            if param.grad is not None:
                gradient = torch.where(mask, param.grad.float(), 0.0)
                master.grad = gradient if master.grad is None else master.grad + gradient
        self.net.zero_grad()

    @torch.no_grad()
    def step(self):
        if self.decay:
            for master, base in zip(self.masters, self.base, strict=True):
                if master.grad is not None:
                    master.lerp_(base.float(), self.lr * self.decay)
        before = [m.detach().clone() for m in self.masters]
        self.adamw.step()
        self.adamw.zero_grad()
        for param, master, mask, old in zip(
            self.params, self.masters, self.masks, before, strict=True
        ):
            master.copy_(torch.where(mask, master, old))  # moments outlive the mask
            param.data = torch.where(self.ever(param), master.to(param.dtype), param.data)

    def ever(self, param):
        i = next(i for i, p in enumerate(self.params) if p is param)
        return self.base[i].float().abs() < self.threshold

    @torch.no_grad()
    def reselect(self):
        self.masks = [
            mask & (master.abs() < self.threshold)
            for mask, master in zip(self.masks, self.masters, strict=True)
        ]

    def assert_equals(self, net):
        found = dict(net.named_parameters())
        for name, param in self.net.named_parameters():
            assert torch.equal(found[name], param), name


def pair(dtype=torch.float32, **options):
    """A model, its optimizer, and the dense reference on a copy of it."""
    net = Net().to(dtype)
    twin = copy.deepcopy(net)
    options = {"lr": LR, "low_rank_weight": 0, **options}
    return net, SaraAdamW(net, THRESHOLD, **options), DenseReference(twin, THRESHOLD, options["lr"])


def on_second_device(module):
    """What a script writes that makes a device in Python, for which it needs a process of its own."""
    if not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"):
        pytest.skip("this torch takes no devices made in Python")
    command = [sys.executable, "-m", module]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
