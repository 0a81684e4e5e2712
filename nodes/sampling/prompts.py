"""Encode several prompts at once."""

from comfy_api.latest import io

from .. import host
from ..delta.load_save_apply import CATEGORY
from ..inputs import searched_as


class SaraPrompts(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SaraPrompts",
            display_name="SaRA Prompts",
            category=CATEGORY,
            description="Encodes several prompts, one a line. Connected to SaRA Sampling, each becomes a row of "
            "the previews or of SaRA Compare.",
            **searched_as("prompt list", "sample prompts", "preview prompts", "batch prompts"),
            inputs=[
                io.Clip.Input("clip", tooltip="CLIP of the model."),
                io.String.Input(
                    "prompts",
                    default="",
                    multiline=True,
                    dynamic_prompts=False,
                    tooltip="A prompt a line; empty lines are skipped.",
                ),
                io.String.Input(
                    "before",
                    default="",
                    tooltip="Put before each of them, such as a trigger word and a comma.",
                ),
            ],
            outputs=[
                io.Conditioning.Output(
                    display_name="positive",
                    is_output_list=True,
                    tooltip="One per prompt. What it is connected to runs once for each.",
                ),
                io.String.Output(
                    display_name="prompts", is_output_list=True, tooltip="The prompts as encoded."
                ),
            ],
        )

    @classmethod
    def execute(cls, clip, prompts, before) -> io.NodeOutput:
        if clip is None:
            raise ValueError(
                "clip is connected to a checkpoint without CLIP; connect a Load CLIP node with the one that "
                "the model was trained with"
            )
        lines = [
            f"{before} {line}".strip() for line in map(str.strip, prompts.splitlines()) if line
        ]
        if not lines:
            raise ValueError("prompts is empty; write at least one line")
        return io.NodeOutput([host.encode_text(clip, line, True) for line in lines], lines)
