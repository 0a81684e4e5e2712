"""What a delta's file says of the run that made it, and what the run is known by."""

import dataclasses
import json
import time
from collections.abc import Sequence

from ...sara_core import SaraAdamW
from ...sara_core.training.run_settings import RunSettings
from ...sara_core.weights.fingerprint import take_fingerprint
from .. import host
from .examples import Examples, describe_examples


def run_metadata(patcher, settings: RunSettings, optimizer: SaraAdamW) -> dict[str, str]:
    """Return what stays the same during a run, as text by key.

    The MODEL may carry LoRAs or be a merge; the file is for what they make of the checkpoint.
    """
    values = dataclasses.asdict(settings) | {"learning_rate": optimizer.param_groups[0]["lr"]}
    words = settings.trigger_words.strip()
    carried = host.patches_carried(patcher)
    foreign = host.foreign_prediction(patcher)
    return {
        **optimizer.delta_metadata(),
        **({"sara.other_prediction": "{} instead of {}".format(*foreign)} if foreign else {}),
        **({"sara.patches_below": carried} if carried else {}),
        **({"modelspec.trigger_phrase": words} if words else {}),
        **base_metadata(patcher, optimizer.names()),
        "sara.settings": json.dumps(values, sort_keys=True),
        "modelspec.architecture": f"{host.architecture(patcher).lower()}/sara",
        "modelspec.title": settings.output_name,
        "modelspec.date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "modelspec.prediction_type": host.noise_schedule(patcher).prediction,
    }


def base_metadata(patcher, names: Sequence[str]) -> dict[str, str]:
    """Return what says which base the parameters that train are of, while the model holds it.

    Names that it does not have are left out; nothing is returned where it has none.
    """
    weights = host.patched_weights(patcher)
    known = [name for name in names if name in weights]
    return {"sara.fingerprint": take_fingerprint(weights, known)} if known else {}


def with_end(metadata: dict[str, str], ended_at: int) -> dict[str, str]:
    """Return what a file says, with the step after which the run was ended, if it was before its last."""
    if not ended_at:
        return metadata
    settings = json.loads(metadata["sara.settings"]) | {"ended_at": ended_at}
    return metadata | {"sara.settings": json.dumps(settings, sort_keys=True)}


def identity(patcher, examples: Examples, held_out: Sequence[int], offloading: bool) -> dict:
    """Say what a run is of, to recognise it when it is resumed, or in another process."""
    rounded = host.rounds_patches(patcher)  # as it is loaded, unless it is offloaded
    return {
        "model": host.architecture(patcher),
        "patches": "" if not rounded else "added on use" if offloading else "rounded to eight bits",
        "sampling": host.sampling_summary(patcher),
        "held out": list(held_out),
        **describe_examples(examples),
    }


def present_metadata(optimizer: SaraAdamW, thumbnail: str) -> dict[str, str]:
    """Return what changes during a run: the steps made, and the newest preview."""
    steps = {"sara.steps": str(optimizer.num_steps)}
    return steps | ({"modelspec.thumbnail": thumbnail} if thumbnail else {})
