"""Learning rate: SaRA's rule for its peak, and its course over the steps."""

import math

RULE_SCALE, RULE_DECAY = 1e-3, 350.0
LARGEST_FITTED = 5e-3  # threshold
SCHEDULES = ("constant", "linear", "cosine")


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


def factor(step: int, num_steps: int, schedule: str = "cosine", warmup_steps: int = 0) -> float:
    """Share of the peak learning rate to use in a step.

    Args:
        step: Optimizer update about to be made, in `[0, num_steps)`.
        num_steps: Updates in the whole run.
        schedule: "constant", or "linear" or "cosine" decay from 1 after the warm-up towards 0
            after the last step.
        warmup_steps: Updates over which the rate rises linearly; the first uses 1 / warmup_steps.

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
    return 1.0 - done if schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
