"""Compare the curves of several runs."""

import os
from fnmatch import fnmatch
from pathlib import Path

from comfy_api.latest import io, ui

from ...sara_core.training.run_folder import LOSSES, SETTINGS, VALIDATION
from ...sara_core.training.run_history import read_history
from .. import output_folder
from ..inputs import chosen, refuse_unchosen, searched_as
from .run_curves import draw_runs, report


def chosen_runs(run: str, others: str) -> list[str]:
    """Return the names of the runs to compare, each once.

    Args:
        run: The one that is chosen.
        others: Further names, separated by commas or line breaks, which may hold wildcards.

    Raises:
        ValueError: A name that no run has.
    """
    known, found = output_folder.runs_with_losses(), [run]
    for pattern in others.replace("\n", ",").split(","):
        if not (pattern := pattern.strip()):
            continue
        matches = [name for name in known if name == pattern or fnmatch(name, pattern)]
        if not matches:
            raise ValueError(
                f"there is no run {pattern!r} in output/sara; there are {', '.join(known) or 'none'}"
            )
        found += matches
    return list(dict.fromkeys(found))


class SaraCompareRuns(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SaraCompareRuns",
            display_name="SaRA Compare Runs",
            category="SaRA",
            description="Draws the loss curves of several runs of SaRA Train in one picture, and tells in which "
            "settings they differ; also of runs that still go on.",
            is_output_node=True,
            **searched_as("loss curves", "training history", "tensorboard", "plot loss"),
            inputs=[
                io.Combo.Input(
                    "run",
                    options=chosen("run", output_folder.runs_with_losses()),
                    tooltip="A folder in output/sara. Press R to refresh the list.",
                ),
                io.String.Input(
                    "others",
                    default="",
                    multiline=True,
                    tooltip="Names of the runs to compare it with, one a line, such as style_00002; style_* takes "
                    "all whose name begins so.",
                ),
                io.Float.Input(
                    "smoothing",
                    default=0.95,
                    min=0.0,
                    max=0.999,
                    step=0.001,
                    tooltip="How much the losses are smoothed: 0 shows every step, 0.95 averages about the last 20. "
                    "Dots are losses on pictures held out, as they are.",
                ),
            ],
            outputs=[
                io.Image.Output(
                    display_name="chart", tooltip="The curves, with a line for each run."
                ),
                io.String.Output(
                    display_name="report",
                    tooltip="How each run went, and the settings that differ.",
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, run):
        return refuse_unchosen(run, "train one with SaRA Train, and press R")

    @classmethod
    def fingerprint_inputs(cls, run, others, smoothing) -> list:
        files = [
            Path(output_folder.run_path(name), file)
            for name in chosen_runs(run, others)
            for file in (SETTINGS, LOSSES, VALIDATION)
        ]
        return [smoothing, *(f"{f} {os.stat(f).st_mtime_ns}" for f in files if f.is_file())]

    @classmethod
    def execute(cls, run, others, smoothing) -> io.NodeOutput:
        names = chosen_runs(run, others)
        histories = [read_history(Path(output_folder.run_path(name)), name) for name in names]
        picture, text = draw_runs(histories, smoothing), report(histories, smoothing)
        shown = {**ui.PreviewImage(picture, cls=cls).as_dict(), **ui.PreviewText(text).as_dict()}
        return io.NodeOutput(picture, text, ui=shown)
