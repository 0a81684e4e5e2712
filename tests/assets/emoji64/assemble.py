"""Assemble a small checkpoint that ComfyUI loads: a denoiser, a tiny VAE and a CLIP-L-shaped text encoder.

usage: assemble.py OUT.safetensors [unet]   (some 300 MB, most of it the generated text encoder)

emoji64 is an MMDiT that ComfyUI takes for SD3's, with 16 channels of latents; emoji64-unet a UNet that it
takes for SD1.5's, with 4.

The text encoder is not trained: twelve CLIP-L layers that do nothing but mix in the causal mean of the tokens
so far (layer 0), over seeded random embeddings. It gives every token its own code and the pooled vector a bag of
words, which is all a model of 286 concepts needs, and it costs no bytes in a repository.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

HERE = Path(__file__).resolve().parent
UNET = HERE.with_name("emoji64_unet")
HIDDEN = 768
NARROW, WIDE = 32, 64  # channels of the VAE that were trained, and that ComfyUI has


def clip_l(seed: int = 0, mix: float = 2.0) -> dict[str, torch.Tensor]:
    """State dict of the text encoder, fp16, keys as in a Hugging Face CLIP-L text model."""
    generator = torch.Generator().manual_seed(seed)
    zeros = torch.zeros
    state = {
        "text_model.embeddings.token_embedding.weight": torch.randn(
            49408, HIDDEN, generator=generator
        ),
        "text_model.embeddings.position_embedding.weight": torch.randn(
            77, HIDDEN, generator=generator
        )
        * 0.25,
    }
    for i in range(12):
        layer = f"text_model.encoder.layers.{i}."
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            state[f"{layer}self_attn.{name}.weight"] = zeros(HIDDEN, HIDDEN)
            state[f"{layer}self_attn.{name}.bias"] = zeros(HIDDEN)
        for name in ("layer_norm1", "layer_norm2"):
            state[f"{layer}{name}.weight"] = torch.ones(HIDDEN)
            state[f"{layer}{name}.bias"] = zeros(HIDDEN)
        state[f"{layer}mlp.fc1.weight"] = zeros(4 * HIDDEN, HIDDEN)
        state[f"{layer}mlp.fc1.bias"] = zeros(4 * HIDDEN)
        state[f"{layer}mlp.fc2.weight"] = zeros(HIDDEN, 4 * HIDDEN)
        state[f"{layer}mlp.fc2.bias"] = zeros(HIDDEN)
    # q = k = 0 makes the causal attention uniform, so layer 0 adds mix * mean of the layer-normed tokens so far.
    state["text_model.encoder.layers.0.self_attn.v_proj.weight"] = torch.eye(HIDDEN)
    state["text_model.encoder.layers.0.self_attn.out_proj.weight"] = torch.eye(HIDDEN) * mix
    state["text_model.final_layer_norm.weight"] = torch.ones(HIDDEN)
    state["text_model.final_layer_norm.bias"] = zeros(HIDDEN)
    return {key: value.half().contiguous() for key, value in state.items()}


def denoiser_state() -> dict[str, torch.Tensor]:
    """State dict of emoji64's diffusion model, ComfyUI's MMDiT."""
    return load_file(HERE / "mmdit.safetensors")


def unet_state() -> dict[str, torch.Tensor]:
    """State dict of emoji64-unet's diffusion model, ComfyUI's UNet."""
    return load_file(UNET / "unet.safetensors")


def vae_state(folder: Path = HERE) -> dict[str, torch.Tensor]:
    """State dict of a VAE, ComfyUI's TAESD; half of its width is zero."""
    return widened_state(load_file(folder / "vae.safetensors"))


def widened_state(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Undo `narrowed`."""
    return {key: _widened(value) for key, value in state.items()}


def _widened(weight: torch.Tensor) -> torch.Tensor:
    wide = torch.zeros([WIDE if n == NARROW else n for n in weight.shape], dtype=weight.dtype)
    wide[tuple(slice(0, n) for n in weight.shape)] = weight
    return wide


def narrowed(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Leave out the half of the VAE's channels that is zero, as it is stored."""
    return {
        key: value[tuple(slice(0, NARROW if n == WIDE else n) for n in value.shape)].contiguous()
        for key, value in state.items()
    }


def assemble(out: Path) -> None:
    """Write emoji64."""
    state = {f"model.diffusion_model.{k}": v for k, v in denoiser_state().items()}
    state |= {f"first_stage_model.{k}": v for k, v in vae_state().items()}
    state |= {f"text_encoders.clip_l.transformer.{k}": v for k, v in clip_l().items()}
    facts = {"modelspec.title": "emoji64", "modelspec.architecture": "stable-diffusion-v3"}
    save_file(state, out, metadata=facts)


def assemble_unet(out: Path) -> None:
    """Write emoji64-unet."""
    state = {f"model.diffusion_model.{k}": v for k, v in unet_state().items()}
    state |= {f"first_stage_model.{k}": v for k, v in vae_state(UNET).items()}
    state |= {f"cond_stage_model.transformer.{k}": v for k, v in clip_l().items()}
    facts = {
        "modelspec.title": "emoji64-unet",
        "modelspec.architecture": "stable-diffusion-v1",
    }
    save_file(state, out, metadata=facts)


if __name__ == "__main__":
    (assemble_unet if "unet" in sys.argv[2:] else assemble)(Path(sys.argv[1]))
