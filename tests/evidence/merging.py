"""Two styles learned apart and put into one model: what is left of each."""

import torch

from .concepts import OLD_STYLES
from .measures import likeness, loss, pictures
from .one import concepts_of, fine_tune
from .plan import SHARE


def run(base, plan):
    """Learn both styles of the plan from the same base, then measure them alone and together."""
    from ..emoji64.measure import Features

    styles, features = (plan["style"], plan["other"]), Features()
    model = base.load()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    unseen, learned, facts = {}, {}, {}
    for style in styles:
        shown, unseen[style] = concepts_of(
            base, style, plan["pictures"], plan["seed"], plan.get("concepts")
        )
        if plan["method"] != "none":
            after, facts = fine_tune(base, plan, style, shown, base.load())
            learned[style] = {name: after[name] - weight for name, weight in before.items()}
    mixes = {"base": {}}
    if learned:
        mixes = {f"{style} alone": {style: 1.0} for style in styles}
        mixes |= {f"{style} at {SHARE}": {style: SHARE} for style in styles}
        mixes["together"] = dict.fromkeys(styles, SHARE)
    found = {}
    for name, mix in mixes.items():
        state = {
            key: weight + sum(share * learned[style][key] for style, share in mix.items())
            for key, weight in before.items()
        }
        model.load_state_dict({**model.state_dict(), **state})
        found[name] = _measured(base, model.eval(), mix or styles, unseen, features)
    return {**plan, **facts, "mixes": found}


@torch.no_grad()
def _measured(base, model, styles, unseen, features):
    """Losses on what was not shown, in the styles that are in and in those of the base, and how pictures look."""
    some = {style: unseen[style][::2] for style in styles}
    every = {style: loss(base, model, style, unseen[style]) for style in unseen}
    known = next(iter(unseen.values()))[::2]
    return {
        "losses": every | {style: loss(base, model, style, known) for style in OLD_STYLES},
        "likeness": {
            style: likeness(base, features, pictures(base, model, style, concepts), style, concepts)
            for style, concepts in some.items()
        },
    }
