"""What people ask of a run from its node while it trains: to save, to preview, to end."""

from collections.abc import Mapping
from queue import Empty, SimpleQueue

PATH = "/sara/ask"
SAVE, PREVIEW, END = WISHES = ("save", "preview", "end")

_runs: dict[str, "Wishes"] = {}


class Wishes:
    """What is asked of a run, until it takes it up between two steps.

    It can be asked while the context is entered.

    Args:
        run: Name of the run, as its chart shows it.
    """

    def __init__(self, run: str):
        self._run = run
        self._asked: SimpleQueue[str] = SimpleQueue()

    def __enter__(self) -> "Wishes":
        _runs[self._run] = self
        return self

    def __exit__(self, *_) -> None:
        _runs.pop(self._run, None)

    def add(self, wish: str) -> None:
        """Ask for one of `WISHES`, from any thread."""
        self._asked.put(wish)

    def take(self) -> list[str]:
        """Return what was asked since, each once, and forget it."""
        taken: dict[str, None] = {}
        while True:
            try:
                taken[self._asked.get_nowait()] = None
            except Empty:
                return list(taken)


def ask(query: Mapping[str, str]) -> dict[str, str | None]:
    """Ask the `run` of a query for its `wish`; returns what is wrong with that under `problem`."""
    run, wish = query.get("run", ""), query.get("wish", "")
    if wish not in WISHES:
        return {"problem": f"{wish!r} cannot be asked; expected one of {', '.join(WISHES)}"}
    wishes = _runs.get(run)  # it may end at any moment
    if wishes is None:
        return {"problem": f"{run!r} is not being trained"}
    wishes.add(wish)
    return {"problem": None}
