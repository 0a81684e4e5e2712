"""Memory, Cancel, and messages to the browser."""

import asyncio
import gc
import logging
from collections.abc import Callable, Mapping
from typing import Any

import comfy.model_management
import comfy.utils
from aiohttp import web
from server import PromptServer

logger = logging.getLogger("comfyui-sara")

Cancelled = comfy.model_management.InterruptProcessingException


def free_memory() -> None:
    """Give back what PyTorch and Python hold but do not need."""
    gc.collect()
    comfy.model_management.soft_empty_cache()


def check_cancelled() -> None:
    """Raise ComfyUI's interrupt if the user has pressed Cancel."""
    comfy.model_management.throw_exception_if_processing_interrupted()


def workflow_id(extra_pnginfo: dict | None) -> str | None:
    """Return the id of the workflow that a prompt came from; None if it is unknown."""
    workflow = extra_pnginfo.get("workflow") if isinstance(extra_pnginfo, dict) else None
    return workflow.get("id") if isinstance(workflow, dict) else None


def send_event(name: str, data: dict) -> None:
    """Send a message to every browser that is connected; without one it goes nowhere."""
    PromptServer.instance.send_sync(name, data)


def add_route(
    path: str, answer: Callable[[Mapping[str, str]], Any], changes_something: bool = False
) -> None:
    """Have the server answer requests for a path, as JSON, with what `answer` makes of the query.

    Args:
        path: Of the requests.
        answer: Called in a thread of its own.
        changes_something: It takes POST requests, and else GET.
    """

    async def handle(request):
        return web.json_response(await asyncio.to_thread(answer, request.query))

    routes = PromptServer.instance.routes
    (routes.post if changes_something else routes.get)(path)(handle)


def add_picture_route(path: str, make: Callable[[Mapping[str, str]], bytes | None]) -> None:
    """Have the server answer requests for a path with a picture in WebP that is made of the query.

    Args:
        path: Of the requests.
        make: Called in a thread of its own; returns None where there is no such picture.
    """

    async def handle(request):
        data = await asyncio.to_thread(make, request.query)
        if data is None:
            return web.Response(status=404)
        headers = {"Cache-Control": "max-age=600"}
        return web.Response(body=data, content_type="image/webp", headers=headers)

    PromptServer.instance.routes.get(path)(handle)


def memory_in_use() -> tuple[int, int]:
    """Return bytes in use and bytes there are on the device that models run on."""
    device = comfy.model_management.get_torch_device()
    try:
        total = comfy.model_management.get_total_memory(device)
        return total - comfy.model_management.get_free_memory(device), total
    except RuntimeError as error:  # of a device in trouble; only shown, never needed
        logger.warning("the memory in use cannot be read: %s", error)
        return 0, 0


class Progress:
    """The node's progress bar. Cancel surfaces as an exception here."""

    def __init__(self, total: int, node_id: str | None):
        self.bar = comfy.utils.ProgressBar(total, node_id=node_id)
        self.done = 0

    def add(self, count: int) -> None:
        """Have more to do."""
        self.bar.total += count

    def step(self) -> None:
        """Show that one more is done.

        Raises:
            comfy.model_management.InterruptProcessingException: The user pressed Cancel.
        """
        self.update(self.done + 1)

    def update(self, done: int) -> None:
        """Show how far it is.

        Raises:
            comfy.model_management.InterruptProcessingException: The user pressed Cancel.
        """
        self.done = done
        self.bar.update_absolute(done)
        check_cancelled()
