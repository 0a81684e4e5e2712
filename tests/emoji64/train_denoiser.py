"""Train the diffusion model further by rectified flow on the VAE's latents, on a CPU.

usage: python -m tests.emoji64.train_denoiser EMOJI64.npz OUT.safetensors MINUTES [--new]

Resumes from OUT.safetensors.state if it is there; begins with the model in the repository, or with fresh
weights if `--new` is given. Most batches attend to the first sixteen tokens alone, which hold every
prompt; one in eight, and all in the last sixth of the time, to all 77 that ComfyUI feeds.
"""

import copy
import math
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from . import BASE_STYLES
from .model import (
    HIDDEN,
    WIDTH,
    Text,
    build,
    get_2d_sincos_pos_embed,
    load_denoiser,
    load_pictures,
    load_vae,
)

BATCH, PEAK_LR, SHORT = 32, 8e-4, 16


def initialise_(model):
    """Set fresh weights: uniform by fan-in and fan-out, modulations zero."""
    generator = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        if "adaLN" in name or name.startswith("final_layer.linear"):
            p.zero_()
        elif p.ndim >= 2:
            spread = math.sqrt(6 / (p[0].numel() + p.shape[0]))
            p.uniform_(-1, 1, generator=generator).mul_(spread)
        else:
            p.fill_(0.0 if name.endswith("bias") else 1.0)
    model.context_embedder.weight.normal_(0, 1 / math.sqrt(HIDDEN) / 2.4, generator=generator)
    model.pos_embed.copy_(torch.as_tensor(get_2d_sincos_pos_embed(WIDTH, 16)).float()[None])


def fill_dead_columns_(state):
    """Give weights whose input is always zero a size that no selection by magnitude takes."""
    generator = torch.Generator().manual_seed(1)
    for key in ("context_embedder.weight", "y_embedder.mlp.0.weight"):
        dead = state[key][:, HIDDEN:]
        dead.copy_(0.25 * torch.randn(dead.shape, generator=generator).sign())


def main(pictures, out, minutes, *options):
    """Train until the minutes are over; the state is saved every five minutes."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    x, _, styles, names = load_pictures(pictures)
    vae, text = load_vae(), Text()
    z = torch.cat([vae.encode(x[styles.index(style)]) for style in BASE_STYLES])
    full = text.ids([f"{style} style, {name}" for style in BASE_STYLES for name in names])
    plain, empty = text.ids([name for _ in BASE_STYLES for name in names]), text.ids([""])
    assert (full == 49407).int().argmax(-1).max() < SHORT

    model = build() if "--new" in options else load_denoiser()
    if "--new" in options:
        with torch.no_grad():
            initialise_(model)
    ema = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(
        model.parameters(), PEAK_LR, betas=(0.9, 0.99), weight_decay=0.01, fused=True
    )
    parts = {"model": model, "ema": ema, "optimizer": optimizer}
    spent, step, state_file = 0.0, 0, Path(f"{out}.state")
    if state_file.is_file():
        state = torch.load(state_file, weights_only=True)
        spent, step = state["spent"], state["step"]
        for name, part in parts.items():
            part.load_state_dict(state[name])
    generator = torch.Generator().manual_seed(step + 1)
    started = saved = time.monotonic() - spent * 60
    mean = 0.0

    def save():
        state = {name: part.state_dict() for name, part in parts.items()}
        torch.save(state | {"spent": spent, "step": step}, state_file)
        weights = {k: v.clone() for k, v in ema.state_dict().items()}
        fill_dead_columns_(weights)
        save_file({k: v.half().contiguous() for k, v in weights.items()}, out)

    while spent < minutes:
        done = spent / minutes
        for group in optimizer.param_groups:
            course = 0.485 * (1 + math.cos(math.pi * done)) + 0.03
            group["lr"] = PEAK_LR * min(1, (step + 1) / 200) * course
        i = torch.randint(0, len(z), (BATCH,), generator=generator)
        draw = torch.rand(BATCH, generator=generator)
        ids = full[i].clone()
        ids[draw < 0.15] = plain[i][draw < 0.15]
        ids[draw > 0.9] = empty
        sigma = torch.sigmoid(torch.randn(BATCH, generator=generator) * 1.1 + 0.2)
        noise = torch.randn(z[i].shape, generator=generator)
        is_long = done > 5 / 6 or torch.rand((), generator=generator) < 1 / 8
        context, pooled = text(ids, 77 if is_long else SHORT)
        s = sigma.view(-1, 1, 1, 1)
        velocity = model((1 - s) * z[i] + s * noise, sigma * 1000, context=context, y=pooled)
        loss = F.mse_loss(velocity, noise - z[i])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        with torch.no_grad():
            keep = min(0.999, (1 + step) / (10 + step))
            torch._foreach_lerp_([*ema.parameters()], [*model.parameters()], 1 - keep)
        spent = (time.monotonic() - started) / 60
        mean += (loss.item() - mean) * max(0.01, 1 / step)
        if step % 100 == 0:
            print(f"{step} {spent:.1f} min, loss {mean:.4f}", flush=True)
        if time.monotonic() - saved > 300:
            saved = time.monotonic()
            save()
    save()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], float(sys.argv[3]), *sys.argv[4:])
