"""What the widgets in the browser showed last, for a page that is opened later."""

from collections import OrderedDict
from collections.abc import Mapping

PATH = "/sara/shown"
MOST = 50

_shown: OrderedDict[tuple, dict] = OrderedDict()


def keep(kind: str, state: dict) -> None:
    """Remember what a node shows, in place of what it showed before; the oldest is forgotten.

    Args:
        kind: Name under which the node puts it out.
        state: As JSON takes it, with `node` and `workflow`.
    """
    key = kind, state["workflow"], state["node"]
    _shown[key] = state
    _shown.move_to_end(key)
    while len(_shown) > MOST:
        _shown.popitem(last=False)


def everything(_query: Mapping[str, str]) -> dict[str, list[dict]]:
    """Return all that is remembered, by kind."""
    found: dict[str, list[dict]] = {}
    for (kind, _, _), state in list(_shown.items()):
        found.setdefault(kind, []).append(state)
    return found
