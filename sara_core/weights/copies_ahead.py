"""Weights that wait in main memory, copied to a graphics card while what came before them is computed with."""

from collections import deque
from typing import Any

import torch
from torch import Tensor

PAUSE = (
    500  # copies of which none is begun ahead after one found no memory: looking for it takes time
)
BEHIND = 2  # copies after which the host waits for the card, so that no more of them pile up
NOTHING = (False, 0, 0)  # was taken yet: whether in backward pass, the one before, and the last


class CopiesAhead:
    """Copies tensors to a device, each begun on a stream of its own when the one before it is asked for.

    Which comes next is known from the last time: what followed these two, in forward or in backward
    pass. A wrong guess costs a copy. At most `BEHIND` + 2 copies are held, as the host
    waits for the device when it is that far ahead.

    Args:
        device: Where copies go.
        backend: What knows of streams and events; found by the device if left out. Without one, copies are
            made when they are asked for.
    """

    def __init__(self, device: torch.device, backend: Any = None):
        if backend is None and device.type in ("cuda", "xpu"):
            backend = getattr(torch, device.type)
        self.device, self._backend = device, backend
        self._stream = backend.Stream(device) if backend else None
        self._following: dict[tuple[bool, int, int], Tensor] = {}
        self._last, self._pause = NOTHING, 0
        self._begun: tuple[Tensor, Tensor, Any] | None = None  # of what, the copy, when it is there
        self._used: deque = deque()

    def take(self, waiting: Tensor) -> Tensor:
        """Return a copy on the device that nobody else has, and begin that of the next."""
        if self._backend is None:
            return waiting.to(self.device, copy=True)
        begun, self._begun = self._begun, None
        if begun is None or begun[0] is not waiting:
            begun = self._begin(waiting)
        _, copy, arrived = begun
        current = self._backend.current_stream(self.device)
        current.wait_event(arrived)
        _record(copy, current)
        self.hold_back()
        self._following[self._last] = waiting
        in_backward = torch._C._current_graph_task_id() != -1
        self._last = in_backward, self._last[-1], id(waiting)
        if (following := self._following.get(self._last)) is not None:
            self._begin_ahead(following)
        return copy

    def _begin_ahead(self, following: Tensor) -> None:
        """Begin a copy, unless memory ran out a short while ago; where it runs out now, it is met later."""
        self._pause = max(0, self._pause - 1)
        if not self._pause:
            try:
                self._begun = self._begin(following)
            except torch.OutOfMemoryError:
                self._pause = PAUSE

    def forget(self) -> None:
        """Let go of all tensors, which may then change again."""
        if self._stream is not None:
            self._stream.synchronize()
        self._following.clear()
        self._used.clear()
        self._last, self._begun, self._pause = NOTHING, None, 0

    def _begin(self, waiting: Tensor) -> tuple[Tensor, Tensor, Any]:
        with self._backend.stream(self._stream):
            copy = waiting.to(self.device, non_blocking=True, copy=True)
            arrived = self._backend.Event()
            arrived.record(self._stream)
        return waiting, copy, arrived

    def hold_back(self) -> None:
        """Wait until what was taken some time ago has been used, so that no more of it piles up."""
        if self._backend is None:
            return
        event = self._backend.Event()
        event.record(self._backend.current_stream(self.device))
        self._used.append(event)
        if len(self._used) > BEHIND:
            self._used.popleft().synchronize()


def _record(tensor: Tensor, stream: Any) -> None:
    """Keep memory from being used again before a stream is done with it, for tensors of several parts too."""
    if hasattr(tensor, "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:
            _record(getattr(tensor, name), stream)
    else:
        tensor.record_stream(stream)
