"""Train emoji64-unet's VAE of four channels, beginning with emoji64's of sixteen.

usage: python -m tests.emoji64.train_vae EMOJI64.npz OUT.safetensors MINUTES

Resumes from OUT.safetensors.state if it is there. As in `train_decoder`, half of TAESD's channels are
trained, and a discriminator of patches helps from three fifths of the time on, when the encoder stays as
it is. Latents come out with mean 0 and deviation 1 for the diffusion model.
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
from .model import TAESD, load_pictures, load_vae
from .train_decoder import BATCH, decoder, discriminator, encoder, narrow_, widened
from .unet import CHANNELS, SCALE

PEAK_LR, ADVERSARIAL, NOISE = 2e-3, 0.3, 0.05


def fresh():
    """Encoder and decoder that begin as emoji64's, with its first four channels of latents."""
    state = load_vae().net.state_dict()
    parts = encoder(CHANNELS), decoder(CHANNELS)
    for part, name in zip(parts, ("encoder", "decoder"), strict=True):
        with torch.no_grad():
            narrow_(part, state, name)
        part.to(memory_format=torch.channels_last)
    return parts


def whole_state(enc, dec, x):
    """ComfyUI's state of the VAE, with the scale and shift that normalise the latents of pictures `x`."""
    state = TAESD(latent_channels=CHANNELS).state_dict()
    state = {k: torch.zeros_like(v) for k, v in state.items()}
    with torch.no_grad():
        latents = torch.cat([enc(part) for part in x.split(64)])
    scale = latents.std() * SCALE
    state = widened(dec.state_dict(), widened(enc.state_dict(), state, "encoder"))
    return {**state, "vae_scale": scale, "vae_shift": -latents.mean() / scale}


def main(pictures, out, minutes):
    """Train until the minutes are over; the state is saved every five minutes."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    x, drawn, _, _ = load_pictures(pictures)
    x = x[torch.from_numpy(drawn)].contiguous(memory_format=torch.channels_last)
    enc, dec = fresh()
    critic = discriminator().to(memory_format=torch.channels_last)
    parameters = [*enc.parameters(), *dec.parameters()]
    optimizer = torch.optim.AdamW(parameters, PEAK_LR, betas=(0.9, 0.98), weight_decay=1e-4)
    critic_optimizer = torch.optim.AdamW(critic.parameters(), 2e-4, betas=(0.5, 0.9))
    parts = {
        "enc": enc,
        "dec": dec,
        "critic": critic,
        "opt": optimizer,
        "critic_opt": critic_optimizer,
    }
    spent, step, state_file = 0.0, 0, Path(f"{out}.state")
    if state_file.is_file():
        state = torch.load(state_file, weights_only=True)
        spent, step = state["spent"], state["step"]
        for name, part in parts.items():
            part.load_state_dict(state[name])
    generator = torch.Generator().manual_seed(step)
    last = dec[-1].weight
    started = saved = time.monotonic() - spent * 60

    def save():
        state = {name: part.state_dict() for name, part in parts.items()}
        torch.save(state | {"spent": spent, "step": step}, state_file)
        save_file({k: v.contiguous() for k, v in narrowed(whole_state(enc, dec, x)).items()}, out)

    while spent < minutes:
        done = spent / minutes
        for group in optimizer.param_groups:
            course = 0.49 * (1 + math.cos(math.pi * done)) + 0.02
            group["lr"] = PEAK_LR * min(1, (step + 1) / 100) * course
        image = x[torch.randint(0, len(x), (BATCH,), generator=generator)]
        sharpening = done > 0.6
        with torch.set_grad_enabled(not sharpening):
            latent = enc(image)
        noise = NOISE * latent.detach().std() * torch.randn(latent.shape, generator=generator)
        made = dec(latent + noise)
        error = made - image
        edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
        loss = error.abs().mean() + 2 * error.square().mean() + 0.5 * edges
        loss = loss + 1e-3 * latent.square().mean()
        if sharpening:
            fooled = -critic(made).mean()
            (plain,) = torch.autograd.grad(loss, last, retain_graph=True)
            (sharp,) = torch.autograd.grad(fooled, last, retain_graph=True)
            loss = (
                loss + ADVERSARIAL * (plain.norm() / (sharp.norm() + 1e-6)).clamp(max=1e3) * fooled
            )
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if done > 0.55:
            drawn_loss = F.relu(1 - critic(image)).mean()
            made_loss = F.relu(1 + critic(made.detach())).mean()
            critic_optimizer.zero_grad()
            (drawn_loss + made_loss).backward()
            critic_optimizer.step()
        step += 1
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
