"""Train emoji64-unet by predicting the noise (epsilon) in its VAE's latents, on a CPU.

usage: python -m tests.emoji64.train_unet EMOJI64.npz VAE.safetensors OUT.safetensors MINUTES

Resumes from OUT.safetensors.state if it is there. Most batches attend to the first sixteen tokens alone,
which hold every prompt; one in eight, and all in the last sixth of the time, to all 77 that ComfyUI feeds.
"""

import copy
import math
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from ..assets.emoji64.assemble import widened_state
from . import BASE_STYLES
from .model import Text, Vae, load_pictures
from .unet import CHANNELS, SCALE, alphas, build, normed

BATCH, PEAK_LR, SHORT = 16, 3e-4, 16


def initialise_(model):
    """Set fresh weights: torch's own for layers, zero for what SD1.5 begins with at zero."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.Conv2d.reset_parameters(module)
        elif isinstance(module, torch.nn.Linear):
            torch.nn.Linear.reset_parameters(module)
        elif isinstance(module, (torch.nn.GroupNorm, torch.nn.LayerNorm)):
            torch.nn.init.ones_(module.weight)
            torch.nn.init.zeros_(module.bias)
    for name, p in model.named_parameters():
        if "out_layers.3." in name or ".proj_out." in name or name.startswith("out.2."):
            p.zero_()


def main(pictures, vae, out, minutes):
    """Train until the minutes are over; the state is saved every five minutes."""
    torch.set_num_threads(1)
    x, _, styles, names = load_pictures(pictures)
    vae, text = Vae(widened_state(load_file(vae)), CHANNELS), Text()
    z = torch.cat([vae.encode(x[styles.index(style)]) for style in BASE_STYLES]) * SCALE
    full = text.ids([f"{style} style, {name}" for style in BASE_STYLES for name in names])
    plain, empty = text.ids([name for _ in BASE_STYLES for name in names]), text.ids([""])
    signal, noise_share = alphas().sqrt(), (1 - alphas()).sqrt()

    model = build()
    with torch.no_grad():
        initialise_(model)
    model = model.to(memory_format=torch.channels_last)
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
        save_file({k: v.half().contiguous() for k, v in ema.state_dict().items()}, out)

    while spent < minutes:
        done = spent / minutes
        for group in optimizer.param_groups:
            course = 0.485 * (1 + math.cos(math.pi * done)) + 0.03
            group["lr"] = PEAK_LR * min(1, (step + 1) / 300) * course
        i = torch.randint(0, len(z), (BATCH,), generator=generator)
        draw = torch.rand(BATCH, generator=generator)
        ids = full[i].clone()
        ids[draw < 0.15] = plain[i][draw < 0.15]
        ids[draw > 0.9] = empty
        is_long = done > 5 / 6 or torch.rand((), generator=generator) < 1 / 8
        context = normed(text.hidden(ids))[:, : 77 if is_long else SHORT]
        t = torch.randint(0, 1000, (BATCH,), generator=generator)
        noise = torch.randn(z[i].shape, generator=generator)
        noisy = signal[t].view(-1, 1, 1, 1) * z[i] + noise_share[t].view(-1, 1, 1, 1) * noise
        noisy = noisy.contiguous(memory_format=torch.channels_last)
        loss = F.mse_loss(model(noisy, t, context=context), noise)
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
    main(*sys.argv[1:4], float(sys.argv[4]))
