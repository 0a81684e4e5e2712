"""What a saved state of `SaraAdamW` has to hold before anything of it is taken over."""

from types import ModuleType

from . import adam_moments, packages

FORMATS = {"fp32": 1, "8bit": 2}  # a version that knows only 1 would take codes for moments
OF_PACKAGES = 3  # what another optimizer than AdamW remembers
PLAIN = (
    "threshold",
    "zeros_skipped",
    "num_considered",
    "low_rank_weight",
    "low_rank_matrices",
    "progressive_step",
    "num_steps",
    "stage",
    "fingerprint",
)


def moments_by_place(state_dict: dict) -> dict[int, dict]:
    """Return the moments of a saved state; torch.distributed.checkpoint has made text of the numbers."""
    return {int(place): state for place, state in state_dict["state"].items()}


def format_of(kind: str, moments: str) -> dict:
    """Return what a saved state says of how it is to be read.

    Args:
        kind: Of the optimizer, one of `packages.KINDS`.
        moments: One of `adam_moments.KINDS`.
    """
    if kind == packages.ADAMW:
        return {"format": FORMATS[moments]}
    return {"format": OF_PACKAGES, "optimizer": kind}


def checked(state_dict: dict, kind: str) -> dict:
    """Return the optimizer's own part of a saved state.

    Args:
        state_dict: What `SaraAdamW.state_dict` returned. Not modified.
        kind: Of the optimizer that is to go on, one of `packages.KINDS`.

    Raises:
        ValueError: It is of something else, or its moments do not fit its weights.
        ImportError: Its moments are in 8 bits, and torchao is missing.
    """
    saved = state_dict.get("sara") if isinstance(state_dict, dict) else None
    needed = {"format", "generator", "weights", *PLAIN}
    formats = {*FORMATS.values(), OF_PACKAGES}
    if (
        not isinstance(saved, dict)
        or saved.keys() - {"optimizer"} != needed
        or saved["format"] not in formats
    ):
        raise ValueError(
            f"not a SaraAdamW state: the key 'sara' of format {max(formats)} or earlier is missing; found keys "
            f"{sorted(map(str, state_dict or ()))[:5]}"
        )
    before = saved.get("optimizer", packages.ADAMW)
    if before != kind:
        raise ValueError(
            f"the saved state is of the optimizer {before}, but this one is {kind}; go on with {before}, or "
            "start from the delta"
        )
    _refuse_unsound_moments(state_dict, adam_moments if kind == packages.ADAMW else packages)
    return saved


def _refuse_unsound_moments(state_dict: dict, remembered: ModuleType) -> None:
    lengths = [len(w["values"]) for w in state_dict["sara"]["weights"] if not w["frozen"]]
    groups, states = state_dict.get("param_groups", []), state_dict.get("state")
    sound = (
        len(groups) == 1
        and groups[0].get("params") == list(range(len(lengths)))
        and groups[0].keys() >= {"lr", "betas", "eps", "weight_decay"}
        and isinstance(states, dict)
        and all(str(place).isdecimal() for place in states)
        and all(
            i < len(lengths) and remembered.is_sound(state, lengths[i])
            for i, state in moments_by_place(state_dict).items()
        )
    )
    if not sound:
        raise ValueError(
            "the saved state is damaged: its moments do not fit its trained weights, or its rates are missing"
        )
    if any(map(adam_moments.is_packed, moments_by_place(state_dict).values())):
        adam_moments.refuse_unusable("8bit")
