"""Inputs from which nothing can be learned are refused by name, before anything is made of them."""

from torch import Tensor

from .examples import Examples

MOST_NAMES = 10


def refuse_unlearnable(examples: Examples) -> None:
    """Refuse latents and embeddings that are not finite, empty latents, and masks that keep nothing.

    Raises:
        ValueError: Naming the pictures.
    """
    labels, latents = examples.labels, examples.latents
    _refuse(
        [name for name, latent in zip(labels, latents, strict=True) if not latent.isfinite().all()],
        "the latents of {} hold NaN or infinity; VAEs such as SDXL's make them in fp16: start "
        "ComfyUI with --fp32-vae or --bf16-vae, or use a VAE that is fixed for fp16",
    )
    _refuse(
        [name for name, latent in zip(labels, latents, strict=True) if not latent.any()],
        "the latents of {} are empty, as those of an Empty Latent node; connect encoded pictures",
    )
    broken = {id(pair[0]) for pair in examples.different_drawn if not _is_finite(pair)}
    captions = [
        *zip(labels, examples.captions, strict=True),
        ("the empty caption", examples.empty),
    ]
    _refuse(
        [name for name, pair in captions if pair is not None and not _is_finite(pair)]
        + [
            name
            for name, drawn in zip(labels, examples.drawn, strict=True)
            if any(id(pair[0]) in broken for pair in drawn)
        ],
        "the captions of {} hold NaN or infinity once encoded; the text encoder may not work in its "
        "precision: try --fp32-text-enc",
    )
    empty = unmasked(examples)
    if examples.masks and len(empty) == len(examples.masks):
        raise ValueError(
            "the masks keep nothing of any picture, so there is nothing to learn; white is what "
            "counts. Load Image gives a black mask for a picture without transparency: disconnect "
            "masks, or invert them"
        )


def unmasked(examples: Examples) -> list[str]:
    """Name the pictures of which a mask keeps nothing."""
    masks = zip(examples.labels, examples.masks or (), strict=False)
    return list(dict.fromkeys(name for name, mask in masks if not mask.any()))


def listed(names: list[str]) -> str:
    """Join names, at most ten."""
    more = len(names) - MOST_NAMES
    return ", ".join(names[:MOST_NAMES]) + (f" and {more} more" if more > 0 else "")


def _refuse(names: list[str], text: str) -> None:
    if names := list(dict.fromkeys(names)):
        raise ValueError(text.format(listed(names)))


def _is_finite(pair: list) -> bool:
    cross_attention, options = pair
    tensors = (cross_attention, options.get("pooled_output"))
    return all(bool(t.isfinite().all()) for t in tensors if isinstance(t, Tensor))
