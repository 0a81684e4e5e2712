"""Deltas to see something of, and what is done with them through the executor."""

import torch
from safetensors import safe_open

from sara_core import DeltaEntry, SparseDelta

from .graphs import Graph, emoji64, saved_latents

STEPS = 4


def make_delta(path, checkpoint, prefix="model.diffusion_model.", size=0.02, seed=0):
    """Write a delta of random changes at a tenth of a model's matrices, large enough to see."""
    generator, entries = torch.Generator().manual_seed(seed), {}
    with safe_open(checkpoint, "pt") as file:
        for key in file.keys():  # noqa: SIM118
            if key.startswith(prefix) and len(file.get_slice(key).get_shape()) > 1:
                shape = tuple(file.get_slice(key).get_shape())
                index = torch.rand(torch.Size(shape).numel(), generator=generator) < 0.1
                index = index.nonzero()[:, 0].int()
                if key.endswith(".weight") and len(index):
                    values = torch.randn(len(index), generator=generator) * size
                    entries[key.removeprefix(prefix)] = DeltaEntry(index, values, shape)
    path.parent.mkdir(exist_ok=True)
    SparseDelta(entries).save(path, torch.float32)


class Scene:
    """emoji64 with texts, and shorthands for what is done with it."""

    def __init__(self, server):
        self.graph = Graph(server)
        self.checkpoint, self.base, self.empty = emoji64(self.graph)
        self.text = self.graph("CLIPTextEncode", clip=self.checkpoint.out(1), text="3d strawberry")

    def delta(self, name="one"):
        return self.graph("SaraLoadDelta", delta_name=f"{name}.safetensors")

    def applied(self, model=None, name="one", strength=1.0, delta=None):
        return self.graph(
            "SaraApply", model=self.base if model is None else model,
            delta=self.delta(name) if delta is None else delta, strength=strength,
        )  # fmt: skip

    def sample(self, name, model, positive=None, steps=STEPS, latent=None, **options):
        latent = latent or self.graph("EmptySD3LatentImage", width=64, height=64, batch_size=1)
        common = {"model": model, "positive": self.text if positive is None else positive,
                  "negative": self.empty, "latent_image": latent, "steps": steps, "cfg": 1.0,
                  "sampler_name": "euler", "scheduler": "simple"}  # fmt: skip
        if options:
            found = self.graph("KSamplerAdvanced", noise_seed=1, **common, **options)
        else:
            found = self.graph("KSampler", seed=1, denoise=1.0, **common)
        self.graph("SaveLatent", samples=found, filename_prefix=f"latents/{name}")
        return found


def same(server, one, two, atol=1e-5):
    one, two = saved_latents(server, one), saved_latents(server, two)
    return torch.allclose(one, two, atol=atol)
