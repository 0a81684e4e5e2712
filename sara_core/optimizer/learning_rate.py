"""Learning rate: SaRA's rule for its peak, and its course over the steps."""

import math

RULE_SCALE, RULE_DECAY = 1e-3, 350.0
LARGEST_FITTED = 5e-3  # threshold
SHARE_SCALE = 1.25e-5  # rate at which all weights would train
GRADIENT_SCALE = 2e-5  # rate at which all weights would train, as chosen by gradient
SCHEDULES = ("constant", "linear", "cosine", "cosine_restarts", "constant_then_linear")
LAST_PART = 0.2  # of the steps after the warm-up, in which constant_then_linear falls


def rule(threshold: float) -> float:
    """Peak learning rate that suits a threshold: `1e-3 * exp(-350 * threshold)`.

    The rule was fitted to five thresholds on SD1.5, from 2e-4 to 5e-3. Beyond the last one its rate there,
    1.7e-4, is kept: followed further the exponential soon learns nothing, while models with larger weights
    were seen to want more.

    Args:
        threshold: Absolute weight value, > 0.

    Source: Hu et al. 2024, arXiv:2409.06633, appendix K, eq. 12; the end is our own.
    """
    return RULE_SCALE * math.exp(-RULE_DECAY * min(threshold, LARGEST_FITTED))


def rule_of_share(fraction: float) -> float:
    """Peak learning rate that suits a share of each layer: `1.25e-5 / fraction`, at most 1e-3.

    The fewer weights train, the farther each goes. On two small models this is within the best rates
    measured for 3, 10, 30 and 100 % (`docs/evidence.md`); the most is that of `rule`.

    Args:
        fraction: In `(0, 1]`.
    """
    return min(SHARE_SCALE / fraction, RULE_SCALE)


def rule_of_gradient(fraction: float) -> float:
    """Peak learning rate that suits a share of the weights, chosen by gradient: `2e-5 / sqrt(fraction)`.

    At most 1e-3, as of `rule_of_share`. It is near the best rates measured on two small models for 3 and 10 %, with
    and without rates of single weights (`docs/evidence.md`).

    Args:
        fraction: In `(0, 1]`.
    """
    return min(GRADIENT_SCALE / math.sqrt(fraction), RULE_SCALE)


def factor(
    step: int, num_steps: int, schedule: str = "cosine", warmup_steps: int = 0, cycles: int = 1
) -> float:
    """Share of the peak learning rate to use in a step.

    Args:
        step: Optimizer update about to be made, in `[0, num_steps)`.
        num_steps: Updates in the whole run.
        schedule: "constant"; "linear" or "cosine" decay from 1 after the warm-up towards 0 after the
            last step; "cosine_restarts", as many such cosines of equal length one after the other as
            there are cycles (Loshchilov and Hutter 2017, arXiv:1608.03983); or "constant_then_linear",
            1 until the last fifth, which falls linearly towards 0.
        warmup_steps: Updates over which the rate rises linearly; the first uses 1 / warmup_steps.
        cycles: Of "cosine_restarts", at least 1.

    Raises:
        ValueError: Unknown schedule.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule is {schedule!r}; expected one of {', '.join(SCHEDULES)}")
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "constant":
        return 1.0
    done = (step - warmup_steps) / max(1, num_steps - warmup_steps)
    if schedule == "linear":
        return 1.0 - done
    if schedule == "constant_then_linear":
        return min(1.0, (1.0 - done) / LAST_PART)
    turns = cycles * done if schedule == "cosine_restarts" else done
    return 0.5 * (1.0 + math.cos(math.pi * (turns % 1.0)))
