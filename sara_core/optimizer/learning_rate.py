"""Learning rate: SaRA's rule for its peak, and its course over the steps."""

import math

RULE_SCALE, RULE_DECAY = 1e-3, 350.0
SMALLEST_USEFUL = 1e-6
SCHEDULES = ("constant", "linear", "cosine")


def rule(threshold: float) -> float:
    """Peak learning rate that suits a threshold: `1e-3 * exp(-350 * threshold)`.

    The rule was fitted to five thresholds on SD1.5, from 2e-4 to 5e-3, and is meant for thresholds
    up to about 1e-2. Elsewhere it is a first guess.

    Args:
        threshold: Absolute weight value, > 0.

    Raises:
        ValueError: The rule yields less than 1e-6, with which nothing would be learned.

    Source: Hu et al. 2024, arXiv:2409.06633, appendix K, eq. 12.
    """
    rate = RULE_SCALE * math.exp(-RULE_DECAY * threshold)
    if rate < SMALLEST_USEFUL:
        raise ValueError(
            f"the learning-rate rule 1e-3 * exp(-350 * threshold) gives {rate:.1e} for threshold "
            f"{threshold:g}, too small to learn anything: it was fitted to thresholds up to about "
            "0.01. Give a learning rate yourself (1e-4 is a start) or select fewer weights"
        )
    return rate


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
