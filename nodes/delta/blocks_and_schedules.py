"""A delta's strength by block, and over the steps."""

from comfy_api.latest import io, ui

from ...sara_core.delta.block_strengths import blocks_in, parse_strengths, scale_blocks
from .. import host
from ..inputs import searched_as, strength_input
from ..sockets import SaraDelta

CATEGORY = "SaRA"


class SaraBlockStrengths(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SaraBlockStrengths",
            display_name="SaRA Block Strengths",
            category=CATEGORY,
            description="Gives each block of a delta a strength of its own. Run it once to see the "
            "blocks it has.",
            is_output_node=True,
            **searched_as("block weights", "layer strengths", "lora block weight"),
            inputs=[
                SaraDelta.Input("delta", tooltip="From Load SaRA Delta or SaRA Train."),
                io.String.Input(
                    "strengths",
                    default="",
                    multiline=True,
                    tooltip="A line for each block that is not to have the strength below, such as "
                    "output_blocks.3: 0.5. A name may have wildcards: output_blocks.*: 0. Later "
                    "lines win.",
                ),
                strength_input("others", 1.0, "Strength of the blocks not named above."),
            ],
            outputs=[
                SaraDelta.Output(display_name="delta", tooltip="Connect to Apply SaRA."),
                io.String.Output(
                    display_name="blocks", tooltip="All blocks with their strengths, a line each."
                ),
            ],
        )

    @classmethod
    def execute(cls, delta, strengths, others) -> io.NodeOutput:
        found = parse_strengths(strengths, blocks_in(delta), others)
        text = "\n".join(f"{block}: {strength:g}" for block, strength in found.items())
        return io.NodeOutput(scale_blocks(delta, found), text, ui=ui.PreviewText(text))


class SaraCreateHook(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SaraCreateHook",
            display_name="Create Hook SaRA",
            category=CATEGORY,
            description="Makes a hook of a delta, to schedule it over the steps with hook keyframes "
            "or to give it to one conditioning only, as for a region.",
            **searched_as("schedule delta", "hook lora", "prompt scheduling"),
            inputs=[
                SaraDelta.Input("delta", tooltip="From Load SaRA Delta or SaRA Train."),
                strength_input("strength", 1.0, "Multiplied with the strengths of the keyframes."),
                io.Hooks.Input("prev_hooks", optional=True, tooltip="Hooks to add this one to."),
            ],
            outputs=[
                io.Hooks.Output(
                    display_name="hooks",
                    tooltip="Connect to Set CLIP Hooks or a Cond Set Props node.",
                )
            ],
        )

    @classmethod
    def execute(cls, delta, strength, prev_hooks=None) -> io.NodeOutput:
        return io.NodeOutput(host.create_hook(delta, strength, prev_hooks))
