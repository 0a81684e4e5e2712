"""Noise, timesteps and losses in a diffusion model's own prediction space.

The model is asked for its estimate of the clean latent, `x0`, whatever it predicts inside. The error
of that estimate times `error_scale` is the error of the prediction itself, so the loss is the one the
family was trained with. Sigma is the noise level in ComfyUI's convention: noise to signal ratio,
or for flow models the share of noise in `[0, 1]`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

PREDICTIONS = ("epsilon", "v", "flow", "edm", "x0", "cosmos_flow")
DISTRIBUTIONS = ("uniform", "logit_normal", "log_normal")
LOSSES: dict[str, Callable[..., Tensor]] = {
    "mse": F.mse_loss,
    "l1": F.l1_loss,
    "huber": F.huber_loss,
    "smooth_l1": F.smooth_l1_loss,
}
WEIGHTINGS = ("none", "min_snr", "debiased", "cosmap")
EDM_LOG_MEAN, EDM_LOG_STD = -1.2, 1.2  # Karras et al. 2022, arXiv:2206.00364, table 1


@dataclass(frozen=True)
class NoiseSchedule:
    """How a model family is noised and what it predicts.

    Args:
        prediction: One of PREDICTIONS.
        distribution: How timesteps are drawn: "uniform" over the training timesteps (epsilon, v),
            "logit_normal" (flow, Esser et al. 2024, arXiv:2403.03206, section 3.1), or "log_normal"
            in sigma (EDM).
        to_sigma: Maps times in `[0, 1)`, shape `(B,)`, to sigma, same shape; it carries the model's
            timestep shift.
        sigma_data: Standard deviation of the data in the v and EDM parametrisation.

    Raises:
        ValueError: Unknown prediction or distribution.
    """

    prediction: str
    distribution: str
    to_sigma: Callable[[Tensor], Tensor]
    sigma_data: float = 1.0

    def __post_init__(self):
        if self.prediction not in PREDICTIONS:
            raise ValueError(f"prediction is {self.prediction!r}; expected one of {PREDICTIONS}")
        if self.distribution not in DISTRIBUTIONS:
            raise ValueError(
                f"distribution is {self.distribution!r}; expected one of {DISTRIBUTIONS}"
            )

    def draw_sigma(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw noise levels as the family is trained. Returns shape `(count,)`, float32, CPU."""
        if self.distribution == "uniform":
            return self.to_sigma(torch.rand(count, generator=generator))
        normal = torch.randn(count, generator=generator)
        if self.distribution == "logit_normal":
            return self.to_sigma(torch.sigmoid(normal))
        return torch.exp(EDM_LOG_MEAN + EDM_LOG_STD * normal)

    def sigma_at(self, share: float) -> float:
        """Return the noise level at a share of noise in `[0, 1)`.

        That is sigma itself in a flow; else the place among the timesteps.
        """
        if self.prediction == "flow":
            return share
        return self.to_sigma(torch.tensor([share])).item()

    def add_noise(self, latents: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        """Mix latents `(B, ...)` and unit noise `(B, ...)` at sigma `(B,)`."""
        sigma = _over(sigma, latents)
        if self.prediction == "flow":
            return (1 - sigma) * latents + sigma * noise
        return latents + sigma * noise

    def error_scale(self, sigma: Tensor) -> Tensor:
        """Return the factor from the error in x0 to the error in the prediction, shape `(B,)`.

        epsilon and flow: `x0 = x - sigma * out`, factor `1 / sigma`. v and EDM: x0 holds the output
        times `sigma * sd / sqrt(sigma^2 + sd^2)` (Karras et al. 2022, eq. 7).
        """
        if self.prediction in ("epsilon", "flow"):
            return 1 / sigma
        if self.prediction in ("v", "edm"):
            return (sigma**2 + self.sigma_data**2).sqrt() / (sigma * self.sigma_data)
        if self.prediction == "cosmos_flow":
            return (sigma + 1) / sigma
        return torch.ones_like(sigma)

    def snr(self, sigma: Tensor) -> Tensor:
        """Return the ratio of signal to noise at sigma, squared, shape `(B,)`."""
        if self.prediction == "flow":
            return ((1 - sigma) / sigma) ** 2
        return (self.sigma_data / sigma) ** 2

    def weight(self, sigma: Tensor, weighting: str, gamma: float = 5.0) -> Tensor:
        """Return what the loss of each sample is multiplied by, shape `(B,)`.

        Of the error in x0, `min_snr` keeps min(SNR, gamma) (Hang et al. 2023, arXiv:2303.09556, section
        3.4) and `debiased` the root of SNR (Yu et al. 2023, arXiv:2310.08442, eq. 8), whatever the
        family predicts: for epsilon that is min(SNR, gamma) / SNR and 1 / root of SNR, for v
        min(SNR, gamma) / (SNR + 1). `cosmap` counts the middle of a flow most, as if its times were drawn by
        the density 2 / (pi - 2 pi t + 2 pi t^2) (Esser et al. 2024, arXiv:2403.03206, section 3.1).

        Raises:
            ValueError: Unknown weighting, or one of flows for another family.
        """
        if weighting not in WEIGHTINGS:
            raise ValueError(f"weighting is {weighting!r}; expected one of {', '.join(WEIGHTINGS)}")
        if weighting == "none":
            return torch.ones_like(sigma)
        if weighting == "cosmap":
            if self.prediction != "flow":
                raise ValueError(
                    f"loss_weighting is 'cosmap', which is for flow models, but the model predicts {self.prediction}; "
                    "choose none, min_snr or debiased"
                )
            return 2 / (math.pi * (1 - 2 * sigma + 2 * sigma**2))
        snr = self.snr(sigma)
        kept = snr.clamp(max=gamma) if weighting == "min_snr" else snr.sqrt()
        return kept / self.error_scale(sigma) ** 2

    def loss(
        self,
        x0: Tensor,
        latents: Tensor,
        sigma: Tensor,
        kind: str = "mse",
        mask: Tensor | None = None,
    ) -> Tensor:
        """Return the loss of each sample in the model's own prediction space.

        Args:
            x0: Estimate of the clean latents, shape `(B, ...)`.
            latents: The clean latents, same shape.
            sigma: Noise levels, shape `(B,)`.
            kind: One of LOSSES.
            mask: What counts, from 0 to 1, in a shape that broadcasts to that of `latents`.

        Returns:
            Shape `(B,)`, float32, averaged over everything but the batch, or over what the mask
            keeps of it; 0 where it keeps nothing.

        Raises:
            ValueError: Unknown loss.
        """
        if kind not in LOSSES:
            raise ValueError(f"loss is {kind!r}; expected one of {', '.join(LOSSES)}")
        error = (x0.float() - latents.float()) * _over(self.error_scale(sigma.float()), latents)
        loss = LOSSES[kind](error, torch.zeros_like(error), reduction="none")
        if mask is None:
            return loss.flatten(1).mean(1)
        mask = mask.expand_as(loss).flatten(1)
        return (loss.flatten(1) * mask).sum(1) / mask.sum(1).clamp(min=1e-6)


def _over(sigma: Tensor, like: Tensor) -> Tensor:
    return sigma.to(like.device).view(-1, *[1] * (like.dim() - 1))
