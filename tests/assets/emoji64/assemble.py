"""Assemble the emoji64 checkpoint that ComfyUI loads: MMDiT + tiny VAE + CLIP-L-shaped text encoder.

usage: assemble.py OUT.safetensors   (about 290 MB, most of it the generated text encoder)

The text encoder is not trained: twelve CLIP-L layers that do nothing but mix in the causal mean of the tokens
so far (layer 0), over seeded random embeddings. It gives every token its own code and the pooled vector a bag of
words, which is all a 281-concept model needs, and it costs no bytes in a repository.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

HERE = Path(__file__).resolve().parent
HIDDEN = 768


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


def assemble(out: Path) -> None:
    state = {
        f"model.diffusion_model.{k}": v for k, v in load_file(HERE / "mmdit.safetensors").items()
    }
    state |= {f"first_stage_model.{k}": v for k, v in load_file(HERE / "vae.safetensors").items()}
    state |= {f"text_encoders.clip_l.transformer.{k}": v for k, v in clip_l().items()}
    save_file(
        state,
        out,
        metadata={"modelspec.title": "emoji64", "modelspec.architecture": "stable-diffusion-v3"},
    )


if __name__ == "__main__":
    assemble(Path(sys.argv[1]))
