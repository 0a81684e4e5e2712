"""All that a run is set to, kept with it by name."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from ..delta.export import EXACT, RANKS
from ..optimizer import packages
from ..optimizer.adam_moments import KINDS
from ..optimizer.average import refuse_bad_decay
from ..optimizer.layer_rates import refuse_bad_rates
from ..optimizer.learning_rate import rule_of_gradient
from ..optimizer.sara_adamw import LOW_RANK_WEIGHT
from ..weights.cutoff import ZEROS
from .config import TrainConfig, check_choice, check_least, check_share

VERSION = 2  # of saved settings; 1 was the widgets of SaRA Train, without a version
SAVE_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
COMPUTE_DTYPES = {
    "auto": None,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
SELECT_FROM = ("model", "each layer")
EACH_LAYER = SELECT_FROM[1]
SELECT_BY = ("size", "gradient")
BY_GRADIENT = SELECT_BY[1]
PUT_OUT = ("last step", "best validation")
TRAINED_IN = ("device", "main memory")
COMFYUIS = -1.0  # guidance
LORA_FILES = ("none", EXACT, *RANKS)
FREE = {"free": True}  # may be changed when a run is resumed, as it changes nothing that is learned


@dataclass(frozen=True)
class RunSettings(TrainConfig):
    """All that a run of SaRA Train is set to; the defaults are those of its widgets.

    Kept with the run by name. A field with `FREE` may be changed when the run is resumed.

    Args:
        threshold: Weights with a magnitude below it train; 0 takes `fraction`.
        fraction: Share of the weights that trains, the smallest ones, in `(0, 1]`, see `select_from`.
        select_from: Where that share is taken, from the whole model or from each layer; one of
            `SELECT_FROM`. A threshold is for the whole model.
        select_by: What says which weights train, one of `SELECT_BY`: their size, or their gradient,
            see `Choosing`. Then the fraction is of each layer, zeros are no matter, and nothing is selected
            anew on the way.
        include: Patterns of parameter names, separated by commas; empty takes all.
        exclude: Patterns of parameter names that do not train.
        zeros: How exact zeros are treated, see `selection.select`.
        learning_rate: Peak; 0 takes the default of `SaraAdamW`.
        progressive: Point of the run, as a share of its steps, from which only weights that are
            still small train; 0 is off.
        low_rank_weight: See `SaraAdamW`.
        weight_decay: See `SaraAdamW`.
        moments: See `SaraAdamW`.
        training_dtype: Precision to compute in, one of `COMPUTE_DTYPES`.
        gradient_checkpointing: Compute blocks again in backward, to save memory.
        offloading: Leave the weights in main memory; they are copied to the device when they are used.
        weights_on_device: With offloading, GB of the weights that stay on the device; -1 takes as many as
            fit beside what the run needs.
        trained_in: Where trained values and what the optimizer keeps of them are, one of `TRAINED_IN`.
        optimizer: See `SaraAdamW`, one of `packages.KINDS`.
        layer_rates: Factors of the learning rate by patterns of parameter names, see `layer_rates.rates_of`.
        ema_decay: See `SaraAdamW`; with an average, it is what is validated, previewed, saved and put out.
        guidance: Value that models distilled with guidance are trained at, where captions carry none of
            their own; below 0 it is that of ComfyUI.
        allow_other_prediction: Train although the model is set to another prediction than that of
            its checkpoint.
        validation_split: Share of the pictures that is held out, in `[0, 1)`.
        validate_every_steps: Steps between two measurements on them.
        epochs: Times the run goes over its pictures; `steps` are counted from it. 0 goes by `steps`.
        patience: Measurements without a lower loss after which the run ends; 0 is off.
        put_out: Which delta the run puts out, one of `PUT_OUT`.
        preview_every_steps: Steps between two rows of previews; 0 makes only the last.
        preview_strength: Strength of what was learned in the previews.
        save_every_steps: Steps between two saves; 0 saves at the change of stage and at the end.
        keep_checkpoints: Number of checkpoints to keep, at least 1.
        keep_state: Keep the state when the run has finished, so that it can go on.
        save_dtype: Precision of saved values, one of `SAVE_DTYPES`.
        lora_file: What is written beside the final delta for loaders of LoRAs, one of `LORA_FILES`.
        tensorboard: Write the curves for TensorBoard as well.
        output_name: Name of the run.
        trigger_words: Words that call up what was learned.

    Raises:
        ValueError: A value out of range.
    """

    steps: int = 500
    batch_size: int = 4
    caption_dropout: float = 0.1
    threshold: float = 0.0
    fraction: float = 0.1
    select_from: str = EACH_LAYER
    select_by: str = SELECT_BY[0]
    include: str = ""
    exclude: str = ""
    zeros: str = "auto"
    learning_rate: float = 0.0
    progressive: float = 0.5
    low_rank_weight: float = LOW_RANK_WEIGHT
    weight_decay: float = 0.0
    moments: str = "fp32"
    training_dtype: str = "auto"
    gradient_checkpointing: bool = field(default=True, metadata=FREE)
    offloading: bool = field(default=False, metadata=FREE)
    weights_on_device: float = field(default=-1.0, metadata=FREE)
    trained_in: str = field(default="device", metadata=FREE)
    optimizer: str = packages.ADAMW
    layer_rates: str = ""
    ema_decay: float = 0.0
    guidance: float = 1.0
    allow_other_prediction: bool = False
    validation_split: float = 0.0
    validate_every_steps: int = 50
    epochs: int = 0
    patience: int = field(default=0, metadata=FREE)
    put_out: str = field(default=PUT_OUT[0], metadata=FREE)
    preview_every_steps: int = field(default=100, metadata=FREE)
    preview_strength: float = field(default=1.0, metadata=FREE)
    save_every_steps: int = field(default=100, metadata=FREE)
    keep_checkpoints: int = field(default=4, metadata=FREE)
    keep_state: bool = field(default=True, metadata=FREE)
    save_dtype: str = "fp16"
    lora_file: str = field(default="none", metadata=FREE)
    tensorboard: bool = field(default=False, metadata=FREE)
    output_name: str = "style"
    trigger_words: str = field(default="", metadata=FREE)

    def __post_init__(self):
        super().__post_init__()
        check_least(
            self, threshold=0, learning_rate=0, low_rank_weight=0, weight_decay=0,
            validate_every_steps=1, preview_every_steps=0, save_every_steps=0, keep_checkpoints=1,
            weights_on_device=-1, guidance=COMFYUIS, epochs=0, patience=0,
        )  # fmt: skip
        check_share(self, "fraction", "progressive", "validation_split")
        refuse_bad_decay(self.ema_decay)
        refuse_bad_rates(self.layer_rates)
        check_choice(
            self, zeros=ZEROS, moments=KINDS, training_dtype=COMPUTE_DTYPES, save_dtype=SAVE_DTYPES,
            lora_file=LORA_FILES, trained_in=TRAINED_IN, put_out=PUT_OUT, select_from=SELECT_FROM,
            select_by=SELECT_BY, optimizer=packages.KINDS,
        )  # fmt: skip

    def refuse_contradictions(self) -> None:
        """Raise if options contradict each other; those of a node that resumes a run may.

        Raises:
            ValueError: They do.
        """
        packages.refuse_beside_package(
            self.optimizer,
            moments=self.moments,
            ema_decay=self.ema_decay,
            layer_rates=self.layer_rates,
        )
        if self.select_by == BY_GRADIENT and self.threshold:
            raise ValueError(
                "select_by is 'gradient', which takes a fraction of the weights, but threshold is "
                f"{self.threshold:g}; set it to 0 and connect nothing to it, or select_by to 'size'"
            )
        goes_by_validation = {"patience": self.patience, "put_out": self.put_out == PUT_OUT[1]}
        for name, is_set in goes_by_validation.items():
            if is_set and not self.validation_split:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}, which goes by the loss on pictures held out, but "
                    "validation_split is 0, so that none are; set it, to 0.1 for example"
                )

    @property
    def selection_rule(self) -> dict:
        """Say which weights train, as `select` takes it: the threshold, or else the fraction and of what."""
        if self.threshold:
            return {"threshold": self.threshold}
        return {"fraction": self.fraction, "by_parameter": self.select_from == EACH_LAYER}

    @property
    def _default_rate(self) -> float | None:
        """The rate where none is set; None leaves it to the optimizer, which goes by the selection."""
        if self.select_by == BY_GRADIENT and self.optimizer != packages.PRODIGY:
            return rule_of_gradient(self.fraction)
        return None

    @property
    def optimizer_options(self) -> dict:
        """What `SaraAdamW` takes beside the model, if weights are selected by size."""
        return {
            **self.selection_rule,
            "lr": self.learning_rate or self._default_rate,
            "rates": self.layer_rates,
            "progressive_step": (
                0 if self.select_by == BY_GRADIENT else round(self.progressive * self.steps)
            ),
            **{
                name: getattr(self, name)
                for name in (
                    "include",
                    "exclude",
                    "zeros",
                    "seed",
                    "low_rank_weight",
                    "weight_decay",
                    "moments",
                    "ema_decay",
                    "optimizer",
                )  # fmt: skip
            },
        }

    def resumed_with(self, other: "RunSettings") -> "RunSettings":
        """Return these settings with those of another that may change when a run is resumed."""
        free = [entry.name for entry in dataclasses.fields(self) if entry.metadata.get("free")]
        changes = {name: getattr(other, name) for name in free}
        if not self.validation_split:  # what goes by it cannot be asked for any more
            changes |= {"patience": 0, "put_out": PUT_OUT[0]}
        # What a run that ran out of memory may need.
        if other.moments == "8bit" and self.optimizer == packages.ADAMW:
            changes["moments"] = "8bit"
        return dataclasses.replace(self, **changes)

    def extended_by(self, steps: int, other: "RunSettings") -> "RunSettings":
        """Return these settings with more steps, at the rate and on the course of another.

        The progressive adjustment stays where it was; where an early end came before it, it is left out
        if it still lies beyond the last step.
        """
        total = self.last_step + steps
        progressive = self.progressive * self.steps / total
        return dataclasses.replace(
            self,
            steps=total,
            schedule_start=self.last_step,
            ended_at=0,
            progressive=progressive if progressive <= 1 else 0.0,
            learning_rate=other.learning_rate,
            lr_schedule=other.lr_schedule,
            warmup_steps=other.warmup_steps,
            lr_cycles=other.lr_cycles,
        )

    def saved(self) -> dict:
        """Return them as JSON takes them."""
        return {"version": VERSION, **dataclasses.asdict(self)}

    @classmethod
    def read(cls, saved: Mapping) -> "RunSettings":
        """Return what was saved, by this version or an earlier one.

        Raises:
            ValueError: Saved by a later version, or not settings.
        """
        values = dict(saved)
        version = values.pop("version", 1)
        # What was done before there was an option.
        values = {"guidance": COMFYUIS, "select_from": SELECT_FROM[0], **values}
        if version == 1:
            values = {"keep_state": False, "allow_other_prediction": True, **values}
        names = {entry.name for entry in dataclasses.fields(cls)}
        unknown = sorted(values.keys() - names)
        if unknown or version not in range(1, VERSION + 1):
            raise ValueError(
                f"these settings are of version {version} and hold {unknown or 'nothing'} that this "
                f"version {VERSION} does not know; they were saved by a later version of the pack"
            )
        return cls(**values)
