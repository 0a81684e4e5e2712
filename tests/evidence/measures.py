"""What a fine-tuned model has learned, and what it has forgotten."""

import torch

from .concepts import OLD_STYLES, RELATIVES, SUBJECT, measured_of

BATCH = 64
SEED = 987_654_321  # of the noise that all models are measured at


def draw(base, style, concepts, draws):
    """Latents, captions, noise and quantiles that are always the same, in batches.

    Noise levels are spread evenly over all of them.
    """
    generator = torch.Generator().manual_seed(SEED)
    count = len(concepts) * draws
    order = torch.randperm(count, generator=generator)
    quantiles = (order + torch.rand(count, generator=generator)) / count
    noise = torch.randn(count, base.channels, 8, 8, generator=generator)
    z = base.latents(style, concepts).repeat(draws, 1, 1, 1)
    ids = base.captions(style, concepts).repeat(draws, 1)
    return zip(*(t.split(BATCH) for t in (z, ids, noise, quantiles)), strict=True)


@torch.no_grad()
def loss(base, model, style, concepts, draws=2):
    """Mean error of the model's own prediction on pictures of a style, at noise that is always the same.

    Args:
        base: The base.
        model: A model of it.
        style: Name.
        concepts: Numbers, (n,).
        draws: Noises per picture.
    """
    errors = [base.errors(model, *part) for part in draw(base, style, concepts, draws)]
    return float(torch.cat(errors).mean())


@torch.no_grad()
def drift(base, model, original, style, concepts):
    """Mean squared distance of two models' predictions on pictures of a style."""
    distances = [
        (base.predict(model, *part)[0] - base.predict(original, *part)[0]).square().mean((1, 2, 3))
        for part in draw(base, style, concepts, 1)
    ]
    return float(torch.cat(distances).mean())


def losses(base, model, original, style, shown, unseen):
    """Losses on the new style, concepts shown and not, and on the styles of the base; and the drift there.

    Of a subject, of which few pictures are left to be measured on, at more noises; and on its relatives.
    """
    old = measured_of(base, style, unseen)
    found = {
        "new": loss(base, model, style, unseen, draws=max(2, 128 // len(unseen))),
        "shown": loss(base, model, style, shown, draws=4),
        **{name: loss(base, model, name, old) for name in OLD_STYLES},
        "drift": drift(base, model, original, OLD_STYLES[0], old),
    }
    if style == SUBJECT:
        relatives = [base.names.index(name) for name in RELATIVES]
        found["relatives"] = loss(base, model, OLD_STYLES[0], relatives, draws=24)
    return found


def pictures(base, model, style, concepts, seed=0):
    """Pictures a model makes of concepts in a style, (n, 3, 64, 64)."""
    return base.decode(base.sample(model, base.prompts(style, concepts), seed))


def likeness(base, features, made, style, concepts):
    """Kernel distance x 1000 to the style's own pictures, and the share that shows its concept."""
    from ..emoji64.measure import kernel_distance, retrieval

    real, found = features(base.pictures(style, concepts)), features(made)
    return {"distance": kernel_distance(found, real), "top-1": retrieval(found, real)}
