"""Say how to sample, compare deltas by what they make, and load all checkpoints of a run."""

import os

from comfy_api.latest import io, ui

from ...sara_core import SparseDelta
from .. import host, output_folder
from ..delta.load_save_apply import CATEGORY
from ..inputs import chosen, refuse_unchosen, searched_as
from ..sockets import SaraDelta, SaraSampling
from .checkpoint_strip import chosen_steps, each_step_once, files_of_steps
from .comparison import compare, parse_strengths, steps_of


class SaraSamplingSettings(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SaraSampling",
            display_name="SaRA Sampling",
            category=CATEGORY,
            description="Says what to sample and how, for the previews of SaRA Train and for SaRA "
            "Compare. Chain several for several prompts; each becomes a row.",
            is_input_list=True,
            **searched_as("training preview", "sample prompts", "validation images"),
            inputs=[
                io.Vae.Input("vae", tooltip="Turns latents into pictures."),
                io.Conditioning.Input("positive", tooltip="What the pictures are to show."),
                io.Conditioning.Input(
                    "negative", tooltip="What they are not to show; an empty prompt will do."
                ),
                io.Latent.Input(
                    "latent",
                    optional=True,
                    tooltip="From an empty latent node: the size of the pictures, and how many are "
                    "made. Without it one is made, at the size the model was trained at.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=False,
                    tooltip="The same noise every time, so that pictures can be compared.",
                ),
                io.Int.Input(
                    "steps", default=20, min=1, max=10_000, tooltip="Steps of the sampler."
                ),
                io.Float.Input(
                    "cfg",
                    default=7.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    tooltip="How strongly the prompt is followed. 1 for models distilled to need "
                    "no guidance, such as Flux.",
                ),
                io.Combo.Input(
                    "sampler_name",
                    options=host.SAMPLERS,
                    default="euler",
                    tooltip="As in KSampler.",
                ),
                io.Combo.Input(
                    "scheduler",
                    options=host.SCHEDULERS,
                    default="normal",
                    tooltip="As in KSampler.",
                ),
                SaraSampling.Input(
                    "previous", optional=True, tooltip="Rows to come before this one."
                ),
            ],
            outputs=[
                SaraSampling.Output(
                    display_name="sampling", tooltip="Connect to SaRA Train or SaRA Compare."
                )
            ],
        )

    @classmethod
    def execute(cls, previous=(), latent=(None,), **settings) -> io.NodeOutput:
        lists = {"latent": latent, **settings}
        rows = [  # as ComfyUI goes over lists: a shorter one repeats its last
            host.Sampling(**{name: given[min(i, len(given) - 1)] for name, given in lists.items()})
            for i in range(max(map(len, lists.values())))
        ]
        return io.NodeOutput([*(row for group in previous for row in group), *rows])


class SaraCompare(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SaraCompare",
            display_name="SaRA Compare",
            category=CATEGORY,
            description="Samples the same pictures with several deltas, each at several strengths, "
            "and draws them as a table: deltas by row, strengths by column.",
            is_input_list=True,
            is_output_node=True,
            hidden=[io.Hidden.unique_id],
            **searched_as("xy plot", "grid", "strength comparison"),
            inputs=[
                io.Model.Input("model", tooltip="Model to apply the deltas to."),
                SaraSampling.Input("sampling", tooltip="From SaRA Sampling: what to sample."),
                SaraDelta.Input(
                    "deltas",
                    tooltip="A delta, or the list of a run's checkpoints from Load SaRA Checkpoints.",
                ),
                io.String.Input(
                    "strengths",
                    default="0, 0.5, 1",
                    tooltip="Strengths to compare, separated by commas. 0 is the model itself.",
                ),
                *(
                    SaraDelta.Input(name, optional=True, tooltip="More deltas, a row each.")
                    for name in ("deltas_2", "deltas_3", "deltas_4")
                ),
            ],
            outputs=[
                io.Image.Output(display_name="sheet", tooltip="The table, with labels."),
                io.Image.Output(
                    display_name="images",
                    is_output_list=True,
                    tooltip="Its pictures, row by row, a batch for each delta, strength and "
                    "SaRA Sampling.",
                ),
            ],
        )

    @classmethod
    def execute(cls, model, sampling, deltas, strengths, deltas_2=(), deltas_3=(), deltas_4=()):
        sheet, pictures = compare(
            model[0],
            [*deltas, *deltas_2, *deltas_3, *deltas_4],
            parse_strengths(strengths[0]),
            [row for group in sampling for row in group],
            cls.hidden.unique_id,
        )
        return io.NodeOutput(sheet, pictures, ui=ui.PreviewImage(sheet, cls=cls))


class SaraLoadCheckpoints(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SaraLoadCheckpoints",
            display_name="Load SaRA Checkpoints",
            category=CATEGORY,
            description="Loads all deltas in the folder of a run: the checkpoints SaRA Train has "
            "kept, the one with the lowest validation loss, and the final one.",
            **searched_as("training checkpoints", "run history"),
            inputs=[
                io.Combo.Input(
                    "run",
                    options=chosen("run", output_folder.runs_with_deltas()),
                    tooltip="A folder in output/sara. Press R to refresh the list.",
                ),
                io.String.Input(
                    "steps",
                    default="",
                    optional=True,
                    tooltip="Steps whose checkpoints are loaded, such as 100, 300; nothing loads all. A click on a "
                    "picture below adds its step or takes it away.",
                ),
            ],
            outputs=[
                SaraDelta.Output(
                    display_name="deltas",
                    is_output_list=True,
                    tooltip="By step. Connect to SaRA Compare.",
                ),
                io.String.Output(
                    display_name="names", is_output_list=True, tooltip="Their file names."
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, run):
        return refuse_unchosen(run, "train one with SaRA Train, and press R")

    @classmethod
    def fingerprint_inputs(cls, run, steps=""):
        files = output_folder.deltas_of_run(run)
        return [
            steps,
            *(f"{file} {os.stat(file).st_mtime_ns} {os.stat(file).st_size}" for file in files),
        ]

    @classmethod
    def execute(cls, run, steps="") -> io.NodeOutput:
        files = {file.name: file for file in output_folder.deltas_of_run(run)}
        chosen = chosen_steps(steps)
        wanted = files_of_steps(run, chosen) if chosen else files
        loaded, broken = [], []
        for name in wanted:
            try:
                loaded.append((SparseDelta.load(files[name]), name))
            except (OSError, ValueError) as error:
                broken.append(str(error))
        if not loaded:
            raise ValueError(f"no delta in {run} can be read:\n" + "\n".join(broken))
        loaded = each_step_once(loaded, lambda pair: (steps_of(pair[0]), pair[1]))
        lines = [f"{len(loaded)} deltas", *(f"left out: {problem}" for problem in broken)]
        return io.NodeOutput(
            [delta for delta, _ in loaded],
            [name for _, name in loaded],
            ui=ui.PreviewText("\n".join(lines)),
        )
