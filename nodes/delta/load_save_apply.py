"""Load, save, merge and apply deltas."""

import os

from comfy_api.latest import io, ui

from ...sara_core import SparseDelta
from ...sara_core.training.run_settings import SAVE_DTYPES
from .. import host, output_folder
from ..inputs import chosen, refuse_unchosen, searched_as, strength_input
from ..sockets import SaraDelta

CATEGORY = "SaRA"


def describe(delta: SparseDelta) -> str:
    """Tell what is in a delta, a line a fact."""
    lines = [f"{delta.num_values:,} weights in {len(delta.entries)} layers"]
    hidden = (
        "sara.parameters",
        "sara.fingerprint",
        "sara.bases",
        "modelspec.hash_sha256",
        "modelspec.thumbnail",
    )
    lines += [f"{key}: {text}" for key, text in sorted(delta.metadata.items()) if key not in hidden]
    return "\n".join(lines)


class SaraLoadDelta(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SaraLoadDelta",
            display_name="Load SaRA Delta",
            category=CATEGORY,
            description="Loads what SaRA Train has learned from a file in models/sara or "
            "output/sara. Press R after a training to see the new file.",
            **searched_as("load fine-tune", "sparse delta"),
            inputs=[
                io.Combo.Input(
                    "delta_name",
                    options=chosen("delta", host.delta_names()),
                    tooltip="File to load. Press R after a training to see the new one.",
                ),
                io.String.Input(
                    "file",
                    default="",
                    optional=True,
                    force_input=True,
                    tooltip="A file's name from SaRA Train; loaded instead of the one chosen.",
                ),
            ],
            outputs=[
                SaraDelta.Output(display_name="delta", tooltip="Connect to Apply SaRA."),
                io.String.Output(display_name="info", tooltip="What the file says about itself."),
            ],
        )

    @classmethod
    def validate_inputs(cls, delta_name, file=""):
        if file is None:  # connected, so known only when it is run
            return True
        return refuse_unchosen(
            delta_name, "train one with SaRA Train, or put a file into models/sara, and press R"
        )

    @classmethod
    def fingerprint_inputs(cls, delta_name, file=""):
        if file is None:
            return ""
        state = os.stat(host.delta_path(file or delta_name))
        return f"{state.st_mtime_ns} {state.st_size}"

    @classmethod
    def execute(cls, delta_name, file="") -> io.NodeOutput:
        delta = SparseDelta.load(host.delta_path(file or delta_name))
        return io.NodeOutput(delta, describe(delta))


class SaraSaveDelta(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SaraSaveDelta",
            display_name="Save SaRA Delta",
            category=CATEGORY,
            description="Writes a delta, such as a merged one, to the output folder. SaRA Train "
            "saves what it learns by itself.",
            is_output_node=True,
            **searched_as("save fine-tune"),
            inputs=[
                SaraDelta.Input("delta", tooltip="What to save."),
                io.String.Input(
                    "filename_prefix",
                    default="sara/delta",
                    tooltip="Name below the output folder; a number is added, so nothing is "
                    "overwritten. In the folder sara it can be loaded again at once.",
                ),
                io.Combo.Input(
                    "dtype",
                    options=list(SAVE_DTYPES),
                    default="fp16",
                    tooltip="Precision of the saved values. fp16 is enough and half as large.",
                ),
            ],
            outputs=[],
        )

    @classmethod
    def execute(cls, delta, filename_prefix, dtype) -> io.NodeOutput:
        path = host.new_output_path(output_folder.checked_prefix(filename_prefix))
        delta.save(path, SAVE_DTYPES[dtype])
        return io.NodeOutput(ui=ui.PreviewText(f"saved {output_folder.output_relative(path)}"))


class SaraMergeDeltas(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SaraMergeDeltas",
            display_name="Merge SaRA Deltas",
            category=CATEGORY,
            description="Adds two deltas of the same model, each times its strength. Chain it for "
            "more than two.",
            **searched_as("add deltas", "combine fine-tunes"),
            inputs=[
                SaraDelta.Input("delta_1", tooltip="First delta."),
                SaraDelta.Input("delta_2", tooltip="Second delta."),
                strength_input("strength_1", 0.6, "Factor of the first delta."),
                strength_input(
                    "strength_2",
                    0.6,
                    "Factor of the second delta. The paper merges styles with 0.6.",
                ),
            ],
            outputs=[SaraDelta.Output(display_name="delta", tooltip="The sum of both.")],
        )

    @classmethod
    def execute(cls, delta_1, delta_2, strength_1, strength_2) -> io.NodeOutput:
        return io.NodeOutput(strength_1 * delta_1 + strength_2 * delta_2)


class SaraApply(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SaraApply",
            display_name="Apply SaRA",
            category=CATEGORY,
            description="Adds a delta to a model, as a patch like a LoRA: it stacks with LoRAs and "
            "other deltas and leaves no trace when it is removed.",
            **searched_as("apply fine-tune", "lora loader", "delta strength"),
            inputs=[
                io.Model.Input("model", tooltip="Model of the kind the delta was trained on."),
                SaraDelta.Input("delta", tooltip="From Load SaRA Delta or SaRA Train."),
                strength_input(
                    "strength",
                    1.0,
                    "How strongly the change is applied: 1 as trained, 0 not at all, more than 1 "
                    "exaggerates, negative does the opposite.",
                ),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="Model with the delta applied.")
            ],
        )

    @classmethod
    def execute(cls, model, delta, strength) -> io.NodeOutput:
        return io.NodeOutput(host.apply_delta(model, delta, strength))
