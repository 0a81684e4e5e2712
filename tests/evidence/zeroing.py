"""What the base loses where weights are set to zero: the observation that SaRA rests on."""

import torch

from .chosen import positions_of
from .concepts import OLD_STYLES
from .measures import drift, loss

SHARES = (0.05, 0.1, 0.2, 0.3, 0.5)


@torch.no_grad()
def run(base, plan):
    """Measure the base with a growing share of its weights at zero, chosen as the plan says."""
    original, model = base.load(), base.load()
    chosen_from = {name: p for name, p in original.named_parameters() if p.dim() > 1}
    here = dict(model.named_parameters())
    concepts = torch.from_numpy(base.drawn[OLD_STYLES[0]])[::2]
    found = {}
    for share in (0.0, *plan.get("shares", SHARES)):
        if share:
            index, _ = positions_of(chosen_from, plan["name"], share, seed=plan["seed"])
            for name, positions in index.items():
                weights = here[name].flatten().clone()
                weights[positions.long()] = 0.0
                here[name].copy_(weights.view(here[name].shape))
        found[str(share)] = {
            **{style: loss(base, model, style, concepts) for style in OLD_STYLES},
            "drift": drift(base, model, original, OLD_STYLES[0], concepts),
        }
        model.load_state_dict(original.state_dict())
    return {**plan, "zeroed": found}
