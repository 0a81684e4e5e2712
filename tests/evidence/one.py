"""One run: fine-tune, measure at several strengths, write one JSON file.

usage: python -m tests.evidence.one EMOJI64.npz OUT.json '{"base": "emoji64", "method": "sara", ...}'
"""

import contextlib
import json
import math
import sys
import time
from pathlib import Path

import torch
from PIL import Image

from .bases import BASES
from .concepts import OLD_STYLES
from .kept import made_by, selection_of
from .measures import likeness, losses, pictures
from .methods import METHODS, Average, adamw, between, learned_weights, num_trained
from .plan import kind
from .text import TrainedText

STRENGTHS = (0.25, 0.5, 0.75, 1.0, 1.25)
CAPTION_DROPOUT = 0.1
CHOICE = (
    "fraction",
    "by_parameter",
    "rates",
    "chosen",
)  # options of how weights are chosen by gradient
SHOWN = 10  # pictures of a run that are kept to be looked at


def concepts_of(base, style, count, seed, most=None):
    """Concepts that are shown, and those that are not, as numbers; drawn by the seed, `most` in all."""
    order = torch.randperm(len(base.drawn[style]), generator=torch.Generator().manual_seed(seed))
    drawn = torch.from_numpy(base.drawn[style])[order]
    return drawn[:count], drawn[count:most]


def gradient_sizes(base, model, style, shown, seed, of_mean=False, batch=8):
    """Mean size of every weight's gradient over 8 batches of the pictures to learn, by name.

    With `of_mean` the size of the mean gradient over 32, which is large where they point the same way.
    """
    batches = 32 if of_mean else 8
    generator = torch.Generator().manual_seed(2_000 + seed)
    sums = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    z, ids = base.latents(style, shown), base.captions(style, shown)
    for _ in range(batches):
        i = torch.randint(0, len(shown), (batch,), generator=generator)
        noise = torch.randn(z[i].shape, generator=generator)
        quantiles = torch.rand(batch, generator=generator)
        base.errors(model, z[i], ids[i], noise, quantiles).mean().backward()
        for name, p in model.named_parameters():
            if p.grad is not None:
                sums[name] += (p.grad if of_mean else p.grad.abs()) / batches
        model.zero_grad()
    return {name: total.abs() for name, total in sums.items()}


def train(
    base, model, optimizer, style, shown, steps, batch, seed, average=None, text_rate=0, prior=None
):  # fmt: skip
    """Fine-tune by a cosine course, or at a constant rate where the optimizer is for that; noise and order depend on the seed alone, whatever the method.

    Each step goes over as many pictures of `prior` as well, latents and token ids, if it is given. Returns
    seconds a step.
    """
    generator = torch.Generator().manual_seed(1_000 + seed)
    of_prior = torch.Generator().manual_seed(4_000 + seed)
    z, ids = base.latents(style, shown), base.captions(style, shown)
    peak = optimizer.param_groups[0]["lr"]
    others = [] if not text_rate else [adamw(list(base.text.parameters()), text_rate)]
    falls = getattr(optimizer, "optimizer", "") != "schedule_free"
    order = torch.empty(0, dtype=torch.long)
    started = time.monotonic()
    for step in range(steps):
        while len(order) < batch:
            order = torch.cat([order, torch.randperm(len(shown), generator=generator)])
        i, order = order[:batch], order[batch:]
        dropped = torch.rand(batch, generator=generator) < CAPTION_DROPOUT
        noise = torch.randn(z[i].shape, generator=generator)
        quantiles = torch.rand(batch, generator=generator)
        words = torch.where(dropped[:, None], base.no_caption, ids[i])
        share = 0.5 * (1 + math.cos(math.pi * step / steps))
        if falls:
            optimizer.param_groups[0]["lr"] = peak * share
        for other in others:
            other.param_groups[0]["lr"] = text_rate * share
        base.errors(model, z[i], words, noise, quantiles).mean().backward()
        if prior is not None:
            j = torch.randint(0, len(prior[0]), (batch,), generator=of_prior)
            noise = torch.randn(z[i].shape, generator=of_prior)
            quantiles = torch.rand(batch, generator=of_prior)
            base.errors(model, prior[0][j], prior[1][j], noise, quantiles).mean().backward()
        for each in (optimizer, *others):
            each.step()
            each.zero_grad()
        if average is not None:
            average.add()
    return (time.monotonic() - started) / steps


def optimizer_of(base, plan, style, shown, model):
    """Add what a plan trains to a model."""
    options = {
        name: v
        for name, v in plan["options"].items()
        if name not in ("average", "text_rate", "prior")
    }
    options |= {"seed": plan["seed"]} if plan["method"] != "full" else {}
    if "gradient" in options.get("chosen", ""):
        of_mean = "mean" in options["chosen"]
        options["gradients"] = gradient_sizes(base, model, style, shown, plan["seed"], of_mean)
    if plan["method"] == "by gradient":
        rule = {name: options.pop(name) for name in CHOICE if name in options}
        options["selection"] = selection_of(base, model, style, shown, plan["seed"], **rule)
    if "progressive" in options:
        options["progressive_step"] = round(options.pop("progressive") * plan["steps"])
    return METHODS[plan["method"]](model, plan["rate"], **options)


def fine_tune(base, plan, style, shown, model):
    """Fine-tune a fresh model on a style's pictures of the concepts that are shown.

    Returns the weights that it then acts with, by name, and facts about the training.
    """
    decay, text_rate = plan["options"].get("average"), plan["options"].get("text_rate", 0)
    names = [name for name, _ in model.named_parameters()]
    if text_rate:
        base.text = TrainedText(torch.cat([base.captions(style, shown), base.no_caption]))
    prior = made_by(base, model, style, shown) if "prior" in plan["options"] else None
    optimizer = optimizer_of(base, plan, style, shown, model)
    facts = {"trained": num_trained(optimizer), "rate": optimizer.param_groups[0]["lr"]}
    average = None if decay is None else Average(model, decay)
    facts["seconds"] = train(
        base, model, optimizer, style, shown, plan["steps"], plan["batch"], plan["seed"], average,
        text_rate, prior,
    )  # fmt: skip
    if average is not None:
        average.put()
    has_average = getattr(optimizer, "has_average", False)
    with optimizer.at_strength(1.0) if has_average else contextlib.nullcontext():
        return learned_weights(model, names), facts


def run(base, plan):
    """Do one run of the plan; returns what is known about it, the model, and concepts not shown."""
    style, seed = plan["style"], plan["seed"]
    shown, unseen = concepts_of(base, style, plan["pictures"], seed, plan.get("concepts"))
    model, original = base.load(), base.load()
    if plan["method"] == "none":
        found = {"0": losses(base, model, original, style, shown, unseen)}
        return {**plan, "losses": found}, model, unseen
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    learned, facts = fine_tune(base, plan, style, shown, base.load())
    found = {}
    for strength in plan.get("strengths", STRENGTHS):
        trains_text = isinstance(base.text, TrainedText)
        text = base.text.at_strength(strength) if trains_text else contextlib.nullcontext()
        with between(model, before, learned, strength), text:
            found[str(strength)] = losses(base, model, original, style, shown, unseen)
    model.load_state_dict({**model.state_dict(), **learned})
    return {**plan, **facts, "losses": found}, model, unseen


def likenesses(base, model, style, unseen):
    """How pictures of concepts that were not shown look beside real ones; and those in the new style."""
    from ..emoji64.measure import Features

    features = Features()
    made = pictures(base, model, style, unseen)
    found = {"new": likeness(base, features, made, style, unseen)}
    for old in OLD_STYLES[:2]:
        some = unseen[::2]
        found[old] = likeness(base, features, pictures(base, model, old, some), old, some)
    return found, made


def looked_at(base, plan, out):
    """Do one run of which pictures are made as well; a row of them is kept beside what is found."""
    facts, model, unseen = run(base, plan)
    facts["likeness"], made = likenesses(base, model.eval(), plan["style"], unseen)
    row = (torch.cat([*made[:SHOWN]], 2).permute(1, 2, 0).clamp(0, 1) * 255).byte()
    Image.fromarray(row.numpy()).save(Path(out).with_suffix(".png"))
    facts["concepts_shown"] = [base.names[i] for i in unseen[:SHOWN]]
    return facts


def main(source, out, plan):
    """Do it and write it."""
    from . import costing, merging, zeroing

    torch.set_num_threads(1)
    plan = json.loads(plan)
    base = BASES[plan["base"]](source)
    what = kind(plan)
    if what == "merging":
        facts = merging.run(base, plan)
    elif what == "zeroing":
        facts = zeroing.run(base, plan)
    elif what == "costing":
        facts = costing.run(base, plan)
    elif what == "looks":
        facts = looked_at(base, plan, out)
    else:
        facts, *_ = run(base, plan)
    part = Path(f"{out}.part")
    part.write_text(json.dumps(facts, indent=1))
    part.replace(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
