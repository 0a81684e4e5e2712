"""Which runs there are, by the question they answer."""

import hashlib
import itertools
import json

SEEDS = (0, 1, 2)
COMMON = {"style": "3d", "pictures": 40, "steps": 300, "batch": 8}
SARA = {"fraction": 0.1, "progressive": 0.5}
REFERENCE = "LoRA r8"  # what methods are compared with
SHARE = 0.6  # of each of two styles, where both are in one model

OF_LAYERS = {**SARA, "by_parameter": True}
LAYERS = {"SaRA, each layer": ("sara", OF_LAYERS, (6e-5, 1.25e-4, 2.5e-4))}

GRIDS = {  # name: method, options, rates
    "SaRA 10 %": ("sara", SARA, (1.25e-4, 2.5e-4, 5e-4, 1e-3)),
    "SaRA, each layer": ("sara", OF_LAYERS, (6e-5, 1.25e-4, 2.5e-4, 5e-4)),
    "random 10 %": ("masked", {"chosen": "random"}, (1.25e-4, 2.5e-4, 5e-4, 1e-3)),
    "largest 10 %": ("masked", {"chosen": "largest"}, (3e-5, 6e-5, 1.25e-4, 2.5e-4, 5e-4)),
    "LoRA r8": ("lora", {"rank": 8}, (1e-4, 2e-4, 3e-4, 4e-4, 8e-4)),
    "LoRA r4": ("lora", {"rank": 4}, (1e-4, 2e-4, 4e-4, 8e-4)),
    "LoRA r20": ("lora", {"rank": 20}, (5e-5, 1e-4, 2e-4, 4e-4)),
    "SHiRA r8": ("shira", {"rank": 8}, (2.5e-4, 5e-4, 1e-3, 2e-3)),
    "full": ("full", {}, (5e-6, 1e-5, 2e-5, 4e-5)),
}


def methods(base, grids=GRIDS, seeds=SEEDS, **changes):
    """Every method at its rates, with every seed."""
    common = {"base": base, **COMMON, **changes}
    plans = [{**common, "name": "base", "method": "none", "options": {}, "rate": 0, "seed": seed}
             for seed in seeds]  # fmt: skip
    for seed, (name, (method, options, rates)) in itertools.product(seeds, grids.items()):
        plans += [
            {
                **common,
                "name": name,
                "method": method,
                "options": options,
                "rate": rate,
                "seed": seed,
            }
            for rate in rates
        ]
    return plans


PARTS = {  # SaRA with one thing changed: what was changed, at the same rates
    "re-selected every 50 steps": {"fraction": 0.1, "every": 50},
    "average of 0.99": {"average": 0.99, **SARA},
    "no second stage": {"fraction": 0.1},
    "no low-rank loss": {"low_rank_weight": 0.0, **SARA},
    "low-rank loss x 10": {"low_rank_weight": 0.005, **SARA},
    "low-rank loss x 100": {"low_rank_weight": 0.05, **SARA},
    "low-rank loss of the change": {"low_rank_weight": 5e-4, **SARA},
    "low-rank loss of the change x 10": {"low_rank_weight": 0.005, **SARA},
    "low-rank loss of the change x 100": {"low_rank_weight": 0.05, **SARA},
    "epsilon 1e-5": {"eps": 1e-5, **SARA},
    "weight decay 10": {"weight_decay": 10.0, **SARA},
}


def _method_of(name, options):
    if "of the change" in name:
        return "low-rank change"
    if "every" in options:
        return "reselecting"
    return "sara"


def parts(base, rates=(2.5e-4, 5e-4), seeds=(0, 1), **changes):
    """SaRA with one part changed at a time, beside SaRA at the same rates."""
    common = {"base": base, **COMMON, **changes}
    known = methods(base, {"SaRA 10 %": ("sara", SARA, rates)}, seeds, **changes)
    return known + [
        {
            **common,
            "name": name,
            "method": _method_of(name, options),
            "options": options,
            "rate": rate,
            "seed": seed,
        }
        for seed, (name, options), rate in itertools.product(seeds, PARTS.items(), rates)
    ]


BY_GRADIENT = (3e-5, 6e-5, 1.25e-4)
BY_MEAN_GRADIENT = {
    "largest mean gradients of each layer": (
        "masked", {"chosen": "layer mean gradient"}, BY_GRADIENT,
    ),
}  # fmt: skip

OF_THE_MODEL = {"fraction": 0.1, "by_parameter": False}
RATED = {"fraction": 0.1, "rates": True}
OWN_RATES = "by gradient and importance, own rates"
SMALLEST_WITH_RATES = {
    "smallest of each layer, own rates": (
        "by gradient", {**RATED, "chosen": "layer"}, (1.25e-4, 2.5e-4, 5e-4),
    ),
}  # fmt: skip
BY_IMPORTANCE = {
    OWN_RATES: ("by gradient", RATED, (6e-5, 1.25e-4, 2.5e-4)),
    "by gradient and importance": ("by gradient", {"fraction": 0.1}, (6e-5, 1.25e-4, 2.5e-4)),
    "by gradient and importance, whole model": (
        "by gradient",
        OF_THE_MODEL,
        (6e-5, 1.25e-4, 2.5e-4),
    ),
}
WITH_PRIOR = {  # each step goes over pictures the base has made as well
    "LoRA r8, with prior pictures": ("lora", {"rank": 8, "prior": True}, (2e-4, 4e-4, 8e-4)),
    "SaRA, each layer, with prior pictures": (
        "sara", {**OF_LAYERS, "prior": True}, (1.25e-4, 2.5e-4, 5e-4),
    ),
    "by gradient and importance, with prior pictures": (
        "by gradient", {"fraction": 0.1, "prior": True}, (1.25e-4, 2.5e-4, 5e-4),
    ),
    f"{OWN_RATES}, with prior pictures": (
        "by gradient", {**RATED, "prior": True}, (1.25e-4, 2.5e-4, 5e-4),
    ),
}  # fmt: skip
BY_IMPORTANCE_ON_UNET = {
    OWN_RATES: ("by gradient", RATED, BY_GRADIENT),
    "by gradient and importance": ("by gradient", {"fraction": 0.1}, BY_GRADIENT),
    "by gradient and importance, whole model": ("by gradient", OF_THE_MODEL, BY_GRADIENT),
}

IDEAS = {  # method, options, rates
    "smallest of each layer": ("masked", {"chosen": "layer"}, (6e-5, 1.25e-4, 2.5e-4, 5e-4)),
    "the same, rates by layer": (
        "masked", {"chosen": "layer", "by_layer_size": True}, (6e-5, 1.25e-4, 2.5e-4, 5e-4),
    ),
    "random, rates by layer": (
        "masked", {"chosen": "random", "by_layer_size": True}, (6e-5, 1.25e-4, 2.5e-4, 5e-4),
    ),
    "rank 8 on the smallest of each layer": (
        "low rank on mask", {"rank": 8, "chosen": "layer"}, (2e-4, 5e-4, 1e-3, 2e-3),
    ),
    "rank 32 on the smallest of each layer": (
        "low rank on mask", {"rank": 32, "chosen": "layer"}, (1e-4, 2e-4, 5e-4, 1e-3),
    ),
    "smallest of each layer, by Muon": (
        "masked", {"chosen": "layer", "equalised": True}, (1.25e-4, 2.5e-4, 5e-4, 1e-3),
    ),
    "smallest 30 % of each layer": (
        "masked", {"chosen": "layer", "fraction": 0.3}, (3e-5, 6e-5, 1.25e-4, 2.5e-4),
    ),
    "smallest 3 % of each layer": (
        "masked", {"chosen": "layer", "fraction": 0.03}, (2.5e-4, 5e-4, 1e-3, 2e-3),
    ),
    "each layer of attention": ("sara", {**OF_LAYERS, "include": "attn"}, (1.25e-4, 2.5e-4, 5e-4)),
    "each layer but modulation": (
        "sara", {**OF_LAYERS, "exclude": "adaLN_modulation"}, (6e-5, 1.25e-4, 2.5e-4),
    ),
    "largest gradients": ("masked", {"chosen": "gradient"}, BY_GRADIENT),
    "largest gradients of the smallest 30 %": (
        "masked", {"chosen": "small gradient"}, (6e-5, 1.25e-4, 2.5e-4),
    ),
    "largest gradients of the smallest 60 %": (
        "masked", {"chosen": "small gradient", "among": 0.6}, (6e-5, 1.25e-4, 2.5e-4),
    ),
    "largest gradients of each layer": ("masked", {"chosen": "layer gradient"}, BY_GRADIENT),
    "largest gradients of each layer's smallest 60 %": (
        "masked", {"chosen": "layer small gradient", "among": 0.6}, BY_GRADIENT,
    ),
    **BY_MEAN_GRADIENT,
    **SMALLEST_WITH_RATES,
    **BY_IMPORTANCE,
    **WITH_PRIOR,
    "largest mean gradients of each layer, 3 %": (
        "masked", {"chosen": "layer mean gradient", "fraction": 0.03}, (6e-5, 1.25e-4, 2.5e-4),
    ),
    "rows of the smallest": ("masked", {"chosen": "rows"}, (2.5e-4, 5e-4)),
    "squares of the smallest": ("masked", {"chosen": "blocks"}, (6e-5, 1.25e-4, 2.5e-4, 5e-4)),
}  # fmt: skip


def beside_known(base, grids, seeds=(0, 1), **changes):
    """Methods at their rates, beside SaRA in both ways, random masks and LoRA."""
    common = {"base": base, **COMMON, **changes}
    compared = ("base", "SaRA 10 %", "SaRA, each layer", "random 10 %", "LoRA r8")
    known = [p for p in methods(base, **changes) if p["name"] in compared and p["seed"] in seeds]
    return known + [
        {**common, "name": name, "method": method, "options": options, "rate": rate, "seed": seed}
        for seed, (name, (method, options, rates)) in itertools.product(seeds, grids.items())
        for rate in rates
    ]


OPTIMIZERS = {  # method, options, rates; Prodigy's is a factor of its own
    "Prodigy": ("sara", {"optimizer": "prodigy", **SARA}, (0.5, 1.0, 2.0)),
    "schedule-free AdamW": ("sara", {"optimizer": "schedule_free", **SARA}, (5e-4, 1e-3, 2e-3)),
}  # fmt: skip


AUTHORS = {"the authors' code": ("authors", {}, (1.25e-4, 2.5e-4, 5e-4))}  # method, options, rates


LOOKS = {  # rates of which pictures are made
    "SaRA 10 %": 2.5e-4, "SaRA, each layer": 1.25e-4, "random 10 %": 2.5e-4, "LoRA r8": 2e-4,
    "full": 2e-5,
}  # fmt: skip


def looks(base, seed=0, **changes):
    """Pictures of some methods, of concepts that were not shown."""
    common = {"base": base, **COMMON, **changes, "seed": seed, "likeness": True}
    plans = [{**common, "name": "base", "method": "none", "options": {}, "rate": 0}]
    for name, rate in LOOKS.items():
        method, options, _ = GRIDS[name]
        plans.append({**common, "name": name, "method": method, "options": options, "rate": rate})
    return plans


ON_UNET = {  # method, options, rates
    "SaRA 10 %": ("sara", SARA, (6e-5, 1.25e-4, 2.5e-4, 5e-4)),
    "smallest of each layer": ("masked", {"chosen": "layer"}, (1.25e-4, 2.5e-4, 5e-4)),
    **LAYERS,
    **BY_MEAN_GRADIENT,
    **BY_IMPORTANCE_ON_UNET,
    "random 10 %": ("masked", {"chosen": "random"}, (6e-5, 1.25e-4, 2.5e-4, 5e-4)),
    "LoRA r8": ("lora", {"rank": 8}, (5e-5, 1e-4, 3e-4, 6e-4)),
    "LoRA r20": ("lora", {"rank": 20}, (5e-5, 1e-4, 2e-4, 4e-4)),
    "full": ("full", {}, (5e-6, 1e-5, 2e-5)),
}

TEXT_RATES = (3e-5, 3e-4, 3e-3)


def with_text(base="emoji64-unet", seed=0, rate=2.5e-4):
    """SaRA with all of the text encoder trained as well, beside SaRA without at the same rate."""
    known = methods(base, {"SaRA 10 %": ("sara", SARA, (rate,))}, seeds=(seed,))
    common = {"base": base, **COMMON, "method": "sara", "rate": rate, "seed": seed}
    return known + [
        {**common, "name": f"and text encoder, {text:g}", "options": {**SARA, "text_rate": text}}
        for text in TEXT_RATES
    ]


ELSEWHERE = {  # method, options, rates
    "SaRA 10 %": ("sara", SARA, (6e-5, 1.25e-4, 2.5e-4, 5e-4)),
    "smallest of each layer": ("masked", {"chosen": "layer"}, (6e-5, 1.25e-4, 2.5e-4)),
    "SaRA, each layer": ("sara", OF_LAYERS, (3e-5, 6e-5, 1.25e-4, 2.5e-4)),
    **BY_MEAN_GRADIENT,
    **BY_IMPORTANCE,
    "random 10 %": ("masked", {"chosen": "random"}, (6e-5, 1.25e-4, 2.5e-4, 5e-4)),
    "LoRA r8": ("lora", {"rank": 8}, (5e-5, 1e-4, 2e-4, 4e-4)),
    "full": ("full", {}, (2.5e-6, 5e-6, 1e-5, 2e-5)),
}

ELSEWHERE_ON_UNET = {  # method, options, rates
    "SaRA 10 %": ("sara", SARA, (6e-5, 1.25e-4, 2.5e-4)),
    **LAYERS,
    **BY_MEAN_GRADIENT,
    **BY_IMPORTANCE_ON_UNET,
    "LoRA r8": ("lora", {"rank": 8}, (5e-5, 1e-4, 2e-4, 4e-4)),
}

SHARES = {  # method, options, rates
    "SaRA 1 %": ("sara", {**SARA, "fraction": 0.01}, (5e-4, 1e-3, 2e-3)),
    "SaRA 3 %": ("sara", {**SARA, "fraction": 0.03}, (2.5e-4, 5e-4, 1e-3)),
    "SaRA 30 %": ("sara", {**SARA, "fraction": 0.3}, (6e-5, 1.25e-4, 2.5e-4)),
}

LONGER = {  # steps: methods with their options and rates
    1000: {
        "SaRA 10 %": ("sara", SARA, (6e-5, 1.25e-4, 2.5e-4)),
        "SaRA, each layer": ("sara", OF_LAYERS, (3e-5, 6e-5, 1.25e-4)),
        "LoRA r8": ("lora", {"rank": 8}, (5e-5, 1e-4, 2e-4)),
    },
    3000: {
        "SaRA 10 %": ("sara", SARA, (3e-5, 6e-5, 1.25e-4)),
        "SaRA, each layer": ("sara", OF_LAYERS, (1.5e-5, 3e-5, 6e-5)),
        "LoRA r8": ("lora", {"rank": 8}, (2.5e-5, 5e-5, 1e-4)),
    },
}


def merged(base="emoji64", seeds=(0, 1)):
    """Two styles learned apart and put into one model, each method at its rate of `LOOKS`."""
    common = {"base": base, **COMMON, "other": "contrast"}
    plans = [
        {**common, "name": "base", "method": "none", "options": {}, "rate": 0, "seed": seeds[0]}
    ]
    for seed, (name, rate) in itertools.product(seeds, LOOKS.items()):
        method, options, _ = GRIDS[name]
        facts = {"name": name, "method": method, "options": options, "rate": rate, "seed": seed}
        plans.append({**common, **facts})
    return plans


def zeroed(seeds=(0, 1, 2)):
    """Both bases with some weights at zero."""
    drawn = [(base, "random", seed) for base in ("emoji64", "emoji64-unet") for seed in seeds]
    chosen = itertools.product(("emoji64", "emoji64-unet"), ("smallest", "layer", "largest"), (0,))
    return [
        {"base": base, "name": name, "method": "zero", "rate": 0, "seed": seed}
        for base, name, seed in (*chosen, *drawn)
    ]


def costs():
    """Both bases, some methods and sizes: a few steps on a machine that does nothing else."""
    sizes = {"SaRA 10 %": GRIDS["SaRA 10 %"], **LAYERS, **SHARES}
    loras = {name: GRIDS[name] for name in ("LoRA r8", "LoRA r4", "LoRA r20", "full")}
    on_unet = {
        name: ON_UNET[name] for name in ("SaRA 10 %", *LAYERS, "LoRA r8", "LoRA r20", "full")
    }
    plans = []
    for base, grids in (("emoji64", sizes | loras), ("emoji64-unet", on_unet)):
        for name, (method, options, rates) in grids.items():
            options = {key: value for key, value in options.items() if key != "progressive"}
            facts = {"name": name, "method": method, "options": options, "rate": rates[0]}
            plans.append({"base": base, **COMMON, **facts, "steps": 20, "seed": 0, "costing": True})
    return plans


def some(*names):
    """Some of the methods of `ELSEWHERE`."""
    return {name: ELSEWHERE[name] for name in names}


QUESTIONS = {  # title in the report: the plans of its runs
    "Methods at their best": lambda: methods("emoji64"),
    "SaRA with one part changed": lambda: parts("emoji64"),
    "What could move SaRA's curve": lambda: beside_known("emoji64", IDEAS),
    "What it looks like": lambda: looks("emoji64"),
    "Methods at their best, on a UNet": lambda: methods("emoji64-unet", ON_UNET, seeds=(0, 1)),
    "Optimizers that choose their rate": lambda: beside_known("emoji64", OPTIMIZERS),
    "The text encoder as well, on a UNet": with_text,
    "Another style: silhouettes": lambda: methods("emoji64", ELSEWHERE, (0, 1), style="contrast"),
    "Another style: outlines": lambda: methods(
        "emoji64", some("SaRA 10 %", "SaRA, each layer", "LoRA r8"), (0, 1), style="openmoji"
    ),
    "A subject": lambda: methods("emoji64", ELSEWHERE, (0, 1), style="blue cat", pictures=5),
    "Two styles together": merged,
    "Ten pictures": lambda: methods(
        "emoji64", some("SaRA 10 %", "SaRA, each layer", "LoRA r8", "full"), (0, 1), pictures=10
    ),
    "A hundred and sixty pictures": lambda: methods(
        "emoji64", some("SaRA 10 %", "SaRA, each layer", "LoRA r8", "full"), (0, 1), pictures=160
    ),
    "Shares of the weights": lambda: beside_known("emoji64", SHARES),
    "A thousand steps": lambda: methods("emoji64", LONGER[1000], (0, 1), steps=1000),
    "Three thousand steps": lambda: methods("emoji64", LONGER[3000], (0,), steps=3000),
    "Weights at zero": zeroed,
    "The authors' code": lambda: beside_known("emoji64", AUTHORS),
    "Silhouettes, on a UNet": lambda: methods(
        "emoji64-unet", ELSEWHERE_ON_UNET, (0, 1), style="contrast"
    ),
    "A subject, on a UNet": lambda: methods(
        "emoji64-unet", ELSEWHERE_ON_UNET, (0, 1), style="blue cat", pictures=5
    ),
    "What it costs": costs,
}


REFERENCES = {  # of questions that have one of their own
    "SaRA with one part changed": "SaRA 10 %",
    "The text encoder as well, on a UNet": "SaRA 10 %",
}


def kind(plan):
    """What a run is for: `merging`, `zeroing`, `costing`, `looks`, or `curves`."""
    if "other" in plan:
        return "merging"
    if plan["method"] == "zero":
        return "zeroing"
    if plan.get("costing"):
        return "costing"
    return "looks" if plan.get("likeness") else "curves"


def quick(questions):
    """One short run of each method on few concepts, which says nothing but that it works; by title."""
    first = {}
    for title, plans in questions.items():
        for plan in plans:
            if plan["method"] == "authors":  # needs a checkout
                continue
            name = title if kind(plan) not in ("curves", "looks") else "The machinery"
            first.setdefault(name, {}).setdefault(plan["method"], plan)
    few = {"pictures": 8, "steps": 3, "strengths": [0.5, 1.0], "concepts": 24, "likeness": False}
    found = {name: [{**plan, **few} for plan in plans.values()] for name, plans in first.items()}
    return {
        name: plans[:2] if kind(plans[0]) == "merging" else plans for name, plans in found.items()
    }


FOUND = (  # by a run, beside its plan
    "losses", "trained", "seconds", "likeness", "concepts_shown", "mixes", "zeroed",
    "cost",
)  # fmt: skip


def plan_of(run):
    """The plan of a run that was done."""
    plan = {name: value for name, value in run.items() if name not in FOUND}
    return plan | ({"likeness": True} if "likeness" in run else {})


def key(plan):
    """File name of a run: all that it depends on, in short."""
    digest = hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()[:10]
    name = "".join(c if c.isalnum() else "_" for c in plan["name"])
    return f"{plan['base']}-{name}-{plan['rate']:g}-{plan['seed']}-{digest}"
