"""Deltas to and from the formats of others."""

import os
from pathlib import Path

from comfy_api.latest import io, ui
from safetensors.torch import save_file

from ...sara_core.delta.authors_format import diffusers_order, read_authors_checkpoint
from ...sara_core.delta.export import EXACT, as_differences, as_lora
from ...sara_core.files.atomic import replace_atomically
from ...sara_core.training.run_settings import SAVE_DTYPES
from .. import host, output_folder
from ..inputs import searched_as
from ..sockets import SaraDelta

CATEGORY = "SaRA"
LORA = "LoRA (approximate)"


class SaraExportDelta(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SaraExportDelta",
            display_name="Export SaRA Delta",
            category=CATEGORY,
            description="Writes a delta as a LoRA file that Load LoRA takes without this pack.",
            is_output_node=True,
            **searched_as("convert to lora", "extract lora", "save lora"),
            inputs=[
                SaraDelta.Input("delta", tooltip="What to export."),
                io.Combo.Input(
                    "format",
                    options=[EXACT, LORA],
                    default=EXACT,
                    tooltip="differences: exact, as large as the layers it changes. LoRA: small, but "
                    "a sparse change is hardly of low rank, so much of it is lost; the node says "
                    "how much is kept.",
                ),
                io.Int.Input(
                    "rank",
                    default=32,
                    min=1,
                    max=1024,
                    tooltip="Rank of the LoRA; higher keeps more.",
                ),
                io.Combo.Input(
                    "dtype",
                    options=list(SAVE_DTYPES),
                    default="fp16",
                    tooltip="Precision of the saved values.",
                ),
                io.String.Input(
                    "filename_prefix",
                    default="loras/sara",
                    tooltip="Name below the output folder; a number is added. In the folder loras "
                    "Load LoRA lists it after R is pressed; from elsewhere move it to models/loras.",
                ),
            ],
            outputs=[
                io.String.Output(display_name="file", tooltip="Path of the file."),
                io.Float.Output(
                    display_name="kept", tooltip="Share of the change's energy that is kept."
                ),
            ],
        )

    @classmethod
    def execute(cls, delta, format, rank, dtype, filename_prefix) -> io.NodeOutput:
        kept, chosen = 1.0, SAVE_DTYPES[dtype]
        if format == LORA:
            tensors, kept = as_lora(delta, rank, chosen)
        else:
            tensors = as_differences(delta, chosen)
        path = host.new_output_path(output_folder.checked_prefix(filename_prefix))
        replace_atomically(Path(path), lambda temporary: save_file(tensors, temporary))
        size = os.path.getsize(path) / 1e6
        text = f"saved {path}\n{size:.1f} MB, {kept:.1%} of the change's energy is kept"
        return io.NodeOutput(path, kept, ui=ui.PreviewText(text))


class SaraImportCheckpoint(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SaraImportCheckpoint",
            display_name="Import SaRA Checkpoint",
            category=CATEGORY,
            description="Reads a checkpoint (unet.pt) of the code that came with the SaRA paper. It "
            "holds values without positions, so the model it was trained on is needed.",
            is_output_node=True,
            **searched_as("unet.pt", "convert checkpoint"),
            inputs=[
                io.Model.Input(
                    "model", tooltip="The SD1.x or SD2.x checkpoint it was trained on, unchanged."
                ),
                io.Combo.Input(
                    "file",
                    options=host.foreign_checkpoint_names(),
                    tooltip="A .pt file in models/sara. Nothing in it is executed.",
                ),
            ],
            outputs=[
                SaraDelta.Output(
                    display_name="delta", tooltip="Connect to Apply SaRA, or Save SaRA Delta."
                )
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, model, file):
        state = os.stat(host.foreign_checkpoint_path(file))
        return f"{state.st_mtime_ns} {state.st_size}"

    @classmethod
    def execute(cls, model, file) -> io.NodeOutput:
        names = host.diffusers_names(model)
        order = [names[name] for name in diffusers_order(names)]
        delta = read_authors_checkpoint(
            host.foreign_checkpoint_path(file), host.base_weights(model), order
        )
        text = f"{delta.num_values:,} weights in {len(delta.entries)} layers"
        return io.NodeOutput(delta, ui=ui.PreviewText(text))
