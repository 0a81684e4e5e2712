"""Weights chosen for what they learn beside what the base would lose, of which it makes pictures itself."""

import dataclasses

import torch

from sara_core import select_by_gradient

from .chosen import positions_of
from .concepts import OLD_STYLES, SEED, known_concepts

LEARNED, BATCHES, KEPT, MADE = 8, 8, 128, 40  # a batch, how many, passes over one picture, pictures


@torch.no_grad()
def made_by(base, model, style, shown):
    """Latents (40, channels, 8, 8) and token ids of pictures the base makes in its own styles."""
    prompts, count = [], len(OLD_STYLES)
    for number, old in enumerate(OLD_STYLES):
        concepts = known_concepts(base, old, style, shown)[number::count]
        prompts += base.prompts(old, concepts[: MADE // count])
    was_training = model.training
    latents = base.sample(model.eval(), prompts, SEED)
    model.train(was_training)
    return latents, base.text.ids(prompts)


def selection_of(
    base, model, style, shown, seed, fraction, by_parameter=True, rates=False, chosen=None
):
    """Choose weights beside pictures the base makes; with rates of their own as SaRA Train does.

    Where other weights are `chosen`, only the rates are found, of those `positions_of` takes for it.
    """
    index = None
    if chosen is not None:
        parameters = {name: p for name, p in model.named_parameters() if p.dim() > 1}
        index, _ = positions_of(parameters, chosen, fraction, seed=seed)
    learned = base.latents(style, shown), base.captions(style, shown)
    kept = made_by(base, model, style, shown)

    def go_over(pictures, size, count, seed):
        z, ids = pictures
        generator = torch.Generator().manual_seed(seed)
        for _ in range(count):
            i = torch.randint(0, len(z), (size,), generator=generator)
            noise = torch.randn(z[i].shape, generator=generator)
            quantiles = torch.rand(size, generator=generator)
            base.errors(model, z[i], ids[i], noise, quantiles).mean().backward()

    found = select_by_gradient(
        model,
        lambda: go_over(learned, LEARNED, BATCHES, 2_000 + seed),
        lambda: go_over(kept, 1, KEPT, 3_000 + seed),
        fraction=fraction,
        by_parameter=by_parameter,
        chosen=index,
    )
    return found if rates else dataclasses.replace(found, weight_rates={})
