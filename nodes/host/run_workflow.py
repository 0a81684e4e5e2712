"""Run an exported workflow without a server, in one process or in several that train together.

    torchrun --nproc-per-node 4 custom_nodes/ComfyUI-SaRA/nodes/host/run_workflow.py workflow_api.json

Every process starts ComfyUI on a graphics card of its own and runs the workflow up to its SaRA Train nodes,
which divide their batches; the first process also runs what comes after them, and writes all files. Further
arguments are ComfyUI's own. Ctrl-C and SIGTERM do what Cancel does.
"""

import argparse
import asyncio
import collections
import contextlib
import datetime
import hashlib
import json
import logging
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__)
STARTED = "SARA_PROCESSES"  # environment variable of processes that were started here
WORKFLOW = "SARA_WORKFLOW"  # digest of what they run
TRAIN = "SaraTrain"
DEVICE_ARGUMENTS = {"--cuda-device", "--default-device", "--oneapi-device-selector"}
PATIENCE = datetime.timedelta(days=1)  # with the others, as torchrun ends all when one dies
CANCELLED = 130


class WorkflowError(RuntimeError):
    """A workflow that cannot be run, or that failed."""


def read_workflow(path: Path) -> dict:
    """Read a workflow in API form.

    Raises:
        WorkflowError: There is none.
    """
    try:
        workflow = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WorkflowError(f"{path} cannot be read as a workflow: {error}") from error
    nodes = list(workflow.values()) if isinstance(workflow, dict) else []
    if not nodes or not all(isinstance(node, dict) and "class_type" in node for node in nodes):
        raise WorkflowError(
            f"{path} is not a workflow in API form; in ComfyUI's page choose File, Export (API)"
        )
    return workflow


def trainings(workflow: dict) -> list[str]:
    """Return the numbers of a workflow's SaRA Train nodes."""
    return [number for number, node in workflow.items() if node["class_type"] == TRAIN]


def find_comfyui(given: Path | None) -> Path:
    """Return the folder of ComfyUI: the one given, the one this pack is in, or the current one.

    Raises:
        WorkflowError: It is none of them.
    """
    tried = [given] if given else [Path(os.path.abspath(HERE)).parents[4], Path.cwd()]
    for folder in tried:
        if (folder / "main.py").is_file() and (folder / "comfy").is_dir():
            return folder.resolve()
    raise WorkflowError(
        f"ComfyUI is not in {' nor in '.join(map(str, tried))}; give its folder with --comfyui"
    )


def choose_device(local_rank: int) -> None:
    """Leave this process one graphics card: of those it may use, the one with its number.

    Raises:
        WorkflowError: There are too few.
    """
    allowed = os.environ.get("CUDA_VISIBLE_DEVICES")
    cards = None if allowed is None else allowed.split(",")
    if cards is not None and local_rank >= len(cards):
        raise WorkflowError(
            f"CUDA_VISIBLE_DEVICES is {allowed}, so there is no graphics card for process {local_rank} "
            f"of this machine; start {len(cards)}, or all with --cpu"
        )
    os.environ["CUDA_VISIBLE_DEVICES"] = cards[local_rank] if cards else str(local_rank)


def start(comfyui: Path, arguments: list[str]):
    """Start ComfyUI in this process without opening a port; returns its server object."""
    sys.path[0] = str(comfyui)  # instead of this file's folder
    sys.argv = [str(comfyui / "main.py"), *arguments]
    import main

    loop, server, _ = main.start_comfyui()
    # Nobody listens, but messages must not pile up.
    asyncio.run_coroutine_threadsafe(server.publish_loop(), loop)
    threading.Thread(target=loop.run_forever, daemon=True).start()
    return server


@contextlib.contextmanager
def joined(size: int) -> Iterator[None]:
    """Form the process group, if there are several."""
    os.environ[STARTED] = str(size)
    if size == 1:
        yield
        return
    import comfy.model_management
    import torch.distributed as dist

    kind = comfy.model_management.get_torch_device().type
    backends = {"cuda": "nccl", "xpu": "xccl"}
    own = f",{kind}:{backends[kind]}" if kind in backends else ""
    # torchrun keeps one store over its restarts; what the processes before have left would mislead.
    store, rank, _ = next(dist.rendezvous("env://", timeout=PATIENCE))
    is_one_machine = os.environ.get("GROUP_WORLD_SIZE", "1") == "1"  # each counts its own restarts
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if is_one_machine else "all"
    store = dist.PrefixStore(f"sara/{attempt}/{size}", store)
    dist.init_process_group(
        f"cpu:gloo{own}", store=store, rank=rank, world_size=size, timeout=PATIENCE
    )
    try:
        yield
    finally:
        dist.destroy_process_group()


def run(server, workflow: dict, is_first: bool) -> None:
    """Run a workflow; processes after the first only its SaRA Train nodes and what they need.

    Raises:
        WorkflowError: It is not valid, or failed.
        KeyboardInterrupt: It was cancelled.
    """
    import execution

    import nodes

    is_valid, error, outputs, problems = asyncio.run(
        execution.validate_prompt("sara", workflow, None if is_first else trainings(workflow))
    )
    if not is_valid or problems:
        lines = [
            f"node {number}, {problem['class_type']}: {part['message']}: {part['details']}"
            for number, problem in problems.items()
            for part in problem["errors"]
        ]
        message = error["message"] if error else "a part of the workflow is not valid"
        raise WorkflowError("\n".join([message, *lines]))
    limits = collections.defaultdict(int)  # of caches that are not used, by names of each version
    executor = execution.PromptExecutor(server, cache_args=limits)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: nodes.interrupt_processing())
    places = {number: place for place, number in enumerate(workflow)}
    first = set(trainings(workflow))  # in the same order everywhere, as they wait for each other
    outputs = sorted(outputs, key=lambda number: (number not in first, places[number]))
    executor.execute(workflow, "sara", {}, outputs)
    for event, facts in executor.status_messages:
        if event == "execution_interrupted":
            raise KeyboardInterrupt
        if event == "execution_error":
            raise WorkflowError(
                f"node {facts['node_id']}, {facts['node_type']}: {facts['exception_message']}"
            )


def main() -> None:
    """Read the command line, start ComfyUI, run the workflow."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("workflow", type=Path, help="in API form")
    parser.add_argument("--comfyui", type=Path, help="its folder, if the pack is not in it")
    options, arguments = parser.parse_known_args()
    rank, size = (int(os.environ.get(name, default))
                  for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))  # fmt: skip
    workflow, comfyui = read_workflow(options.workflow), find_comfyui(options.comfyui)
    if size > 1 and not trainings(workflow):
        raise WorkflowError("the workflow has no SaRA Train; only that runs in several processes")
    if refused := DEVICE_ARGUMENTS & {argument.partition("=")[0] for argument in arguments}:
        raise WorkflowError(
            f"{', '.join(sorted(refused))} has no effect here; choose cards with CUDA_VISIBLE_DEVICES"
        )
    os.environ[WORKFLOW] = hashlib.sha256(options.workflow.read_bytes()).hexdigest()[:16]
    if size > 1 and "--cpu" not in arguments:
        choose_device(int(os.environ["LOCAL_RANK"]))
    with tempfile.TemporaryDirectory(prefix="sara_") as own:
        places = ["--temp-directory", own, "--database-url", "sqlite:///:memory:"]
        server = start(comfyui, [*arguments, *places])
        if rank:
            logging.getLogger().setLevel(logging.WARNING)
        with joined(size):
            run(server, workflow, is_first=rank == 0)


def tell(error: WorkflowError) -> None:
    """Leave an error where torchrun looks for what to show when all have ended."""
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        get_error_handler().record_exception(error)


if __name__ == "__main__":
    try:
        main()
    except WorkflowError as problem:
        tell(problem)
        sys.exit(str(problem))
    except KeyboardInterrupt:
        sys.exit(CANCELLED)
