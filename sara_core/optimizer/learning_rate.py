"""Learning rate: SaRA's rule for its peak, and its course over the steps."""

import math

RULE_SCALE, RULE_DECAY = 1e-3, 350.0
LEAST = 1.25e-4
SCHEDULES = ("constant", "linear", "cosine", "cosine_restarts", "constant_then_linear")
LAST_PART = 0.2  # of the steps after the warm-up, in which constant_then_linear falls


def rule(threshold: float) -> float:
    """Peak learning rate that suits a threshold: `1e-3 * exp(-350 * threshold)`.

    The rule was fitted to five thresholds on SD1.5, from 2e-4 to 5e-3. Followed much further the exponential
    soon learns nothing. So the rate is at least 1.25e-4, which learned most for what was forgotten on two small
    models of thresholds beyond (`docs/evidence.md`).

    Args:
        threshold: Absolute weight value, > 0.

    Source: Hu et al. 2024, arXiv:2409.06633, appendix K, eq. 12; the end is our own.
    """
    return max(RULE_SCALE * math.exp(-RULE_DECAY * threshold), LEAST)


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
