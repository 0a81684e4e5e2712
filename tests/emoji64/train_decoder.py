"""Train the VAE's decoder further while its encoder, and so the latents, stay as they are.

usage: python -m tests.emoji64.train_decoder EMOJI64.npz OUT.safetensors MINUTES

Resumes from OUT.safetensors.state if it is there. Thirty-two of TAESD's sixty-four channels are trained;
the others are zero. The loss is that of the pictures and of their edges, and from a fifth of the time on
that of a discriminator of patches (Esser et al. 2021, arXiv:2012.09841, with its adaptive weight).
"""

import math
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from ..assets.emoji64.assemble import narrowed
from .model import load_pictures, load_vae

WIDTH, BATCH, PEAK_LR, ADVERSARIAL = 32, 16, 1e-3, 0.3


def conv(n_in, n_out, **kwargs):
    """A 3x3 convolution that keeps the size."""
    return nn.Conv2d(n_in, n_out, 3, padding=1, **kwargs)


class Block(nn.Module):
    """TAESD's block, of any width."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Sequential(
            conv(WIDTH, WIDTH), nn.ReLU(), conv(WIDTH, WIDTH), nn.ReLU(), conv(WIDTH, WIDTH)
        )
        nn.init.zeros_(self.conv[4].weight)
        nn.init.zeros_(self.conv[4].bias)

    def forward(self, x):
        """Add what the convolutions make."""
        return F.relu(self.conv(x) + x)


class Clamp(nn.Module):
    """TAESD's soft limit of latents."""

    def forward(self, x):
        """Limit to -3 to 3."""
        return torch.tanh(x / 3) * 3


def encoder(channels):
    """TAESD's encoder at `WIDTH` channels; its layers have the same numbers."""
    stages = [
        m
        for _ in range(3)
        for m in (conv(WIDTH, WIDTH, stride=2, bias=False), Block(), Block(), Block())
    ]
    return nn.Sequential(conv(3, WIDTH), Block(), *stages, conv(WIDTH, channels))


def decoder(channels=16):
    """TAESD's decoder at `WIDTH` channels; its layers have the same numbers."""
    stages = [
        m
        for _ in range(3)
        for m in (
            Block(),
            Block(),
            Block(),
            nn.Upsample(scale_factor=2),
            conv(WIDTH, WIDTH, bias=False),
        )
    ]
    return nn.Sequential(
        Clamp(), conv(channels, WIDTH), nn.ReLU(), *stages, Block(), conv(WIDTH, 3)
    )


def discriminator():
    """Whether each patch of a picture is drawn or decoded."""
    layers, width = [], 3
    for n in (32, 64, 96):
        layers += [nn.Conv2d(width, n, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        width = n
    return nn.Sequential(*layers, conv(width, 1))


def narrow_(target, state, part="decoder"):
    """Copy the leading channels of a wide state into a narrow module, where they are not all zero."""
    for key, value in target.state_dict().items():
        found = state[f"taesd_{part}.{key}"][tuple(slice(0, n) for n in value.shape)]
        if found.abs().sum() > 0:
            value.copy_(found)


def widened(narrow, state, part="decoder"):
    """The whole VAE's state in fp16, with a narrow decoder or encoder in it."""
    out = {k: v.clone() for k, v in state.items()}
    for key, value in narrow.items():
        wide = torch.zeros_like(out[f"taesd_{part}.{key}"])
        wide[tuple(slice(0, n) for n in value.shape)] = value.to(wide.dtype)
        out[f"taesd_{part}.{key}"] = wide
    return {k: v if k.startswith("vae_") else v.half() for k, v in out.items()}


def main(pictures, out, minutes):
    """Train until the minutes are over; the state is saved every five minutes."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    x, drawn, _, _ = load_pictures(pictures)
    x = x[torch.from_numpy(drawn)]
    vae = load_vae()
    z = (vae.encode(x) - vae.net.vae_shift) * vae.net.vae_scale
    net = decoder().to(memory_format=torch.channels_last)
    critic = discriminator().to(memory_format=torch.channels_last)
    with torch.no_grad():
        narrow_(net, vae.net.state_dict())
    ema = {k: v.clone() for k, v in net.state_dict().items()}
    optimizer = torch.optim.AdamW(net.parameters(), PEAK_LR, betas=(0.9, 0.98), weight_decay=1e-4)
    critic_optimizer = torch.optim.AdamW(critic.parameters(), 2e-4, betas=(0.5, 0.9))
    parts = {"net": net, "critic": critic, "opt": optimizer, "critic_opt": critic_optimizer}
    spent, step, state_file = 0.0, 0, Path(f"{out}.state")
    if state_file.is_file():
        state = torch.load(state_file, weights_only=True)
        spent, step, ema = state["spent"], state["step"], state["ema"]
        for name, part in parts.items():
            part.load_state_dict(state[name])
    generator = torch.Generator().manual_seed(step)
    last = net[-1].weight
    started = saved = time.monotonic() - spent * 60

    def save():
        state = {name: part.state_dict() for name, part in parts.items()}
        torch.save(state | {"ema": ema, "spent": spent, "step": step}, state_file)
        save_file(narrowed(widened(ema, vae.net.state_dict())), out)

    while spent < minutes:
        done = spent / minutes
        for group in optimizer.param_groups:
            group["lr"] = (
                PEAK_LR * min(1, (step + 1) / 100) * (0.49 * (1 + math.cos(math.pi * done)) + 0.02)
            )
        i = torch.randint(0, len(x), (BATCH,), generator=generator)
        image = x[i].contiguous(memory_format=torch.channels_last)
        noise = 0.03 * torch.randn(z[i].shape, generator=generator)
        made = net((z[i] + noise).contiguous(memory_format=torch.channels_last))
        error = made - image
        edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
        loss = error.abs().mean() + error.square().mean() + 0.5 * edges
        is_adversarial = done > 0.2
        if is_adversarial:
            fooled = -critic(made).mean()
            (plain,) = torch.autograd.grad(loss, last, retain_graph=True)
            (sharp,) = torch.autograd.grad(fooled, last, retain_graph=True)
            weight = (plain.norm() / (sharp.norm() + 1e-6)).clamp(max=1e3)
            loss = loss + ADVERSARIAL * weight * fooled
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        if done > 0.15:
            drawn_loss = F.relu(1 - critic(image)).mean()
            made_loss = F.relu(1 + critic(made.detach())).mean()
            critic_optimizer.zero_grad()
            (drawn_loss + made_loss).backward()
            critic_optimizer.step()
        step += 1
        with torch.no_grad():
            for key, value in net.state_dict().items():
                ema[key].lerp_(value, 1 - min(0.999, (1 + step) / (10 + step)))
        spent = (time.monotonic() - started) / 60
        if step % 100 == 0:
            psnr = -10 * math.log10(float(error.detach().square().mean()))
            print(f"{step} {spent:.1f} min, {psnr:.2f} dB, loss {loss.item():.4f}", flush=True)
        if time.monotonic() - saved > 300:
            saved = time.monotonic()
            save()
    save()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], float(sys.argv[3]))
