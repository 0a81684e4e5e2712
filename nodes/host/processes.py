"""The processes that run this workflow together, if `run_workflow` has started several."""

import os
import platform

import torch

from ...sara_core.training.processes import Processes
from .run_workflow import STARTED, WORKFLOW


def processes() -> Processes:
    """Return them; where ComfyUI runs as a server this process is alone.

    Nothing else is gone by: another pack may have initialised torch.distributed for its own ends.
    """
    return Processes(torch.device("cpu"), int(os.environ.get(STARTED, 1)) > 1)


def job(node_id: str | None) -> str | None:
    """Name what a scheduler or torchrun starts again after a failure, for one node of its workflow.

    Returns:
        None if nothing does.
    """
    if STARTED not in os.environ:
        return None
    run = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    if run == "none":  # torchrun itself does not end between its restarts
        run = f"{platform.node()} {os.getppid()}"
    return f"{os.environ.get('SLURM_JOB_ID', run)} {os.environ[WORKFLOW]} {node_id}"


def is_restarted() -> bool:
    """Tell whether this job has been started before, and has failed or was interrupted."""
    counts = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")
    return any(int(os.environ.get(name, 0)) for name in counts)
