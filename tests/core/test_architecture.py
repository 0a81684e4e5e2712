"""docs/architecture.md shows the rooms as the imports have them; ARCHITECTURE=write draws them anew."""

import ast
import os
import re

from .test_import_direction import ROOMS, ROOT, modules_imported, room_of

PAGE = ROOT / "docs" / "architecture.md"
MARK = re.compile(r"(<!-- (\w+): made from the code -->\n).*?(<!-- end -->)", re.DOTALL)


def edges():
    """Rooms that each room imports, without those that follow from others."""
    direct = {
        room: {
            room_of(target)
            for path in (ROOT / room).glob("*.py")
            for target in modules_imported(path)
        }
        & (ROOMS.keys() - {room})
        for room in ROOMS
    }

    def reached(room):
        return {lower for one in direct[room] for lower in {one, *reached(one)}}

    return {
        room: sorted(one for one in lower if one not in {r for o in lower for r in reached(o)})
        for room, lower in direct.items()
    }


def picture():
    """The rooms as a diagram, arrows from a room to those it uses."""
    lines = ["```mermaid", "flowchart TD"]
    for part in ("nodes", "sara_core"):
        rooms = [room for room in ROOMS if room.startswith(f"{part}/")]
        lines += [
            f"  subgraph {part}",
            *(f"    {r.replace('/', '_')}[{r}]" for r in rooms),
            "  end",
        ]
    for room, lower in edges().items():
        lines += [f"  {room.replace('/', '_')} --> {one.replace('/', '_')}" for one in lower]
    return "\n".join([*lines, "```", ""])


def rooms():
    """Every room with its files and what each is for, by their docstrings."""
    lines = []
    for room in ROOMS:
        purpose = ast.get_docstring(ast.parse((ROOT / room / "__init__.py").read_text("utf-8")))
        lines += [f"### {room}", "", purpose.splitlines()[0], "", "| file | |", "|---|---|"]
        for path in sorted((ROOT / room).glob("[!_]*.py")):
            first = ast.get_docstring(ast.parse(path.read_text("utf-8"))).splitlines()[0]
            lines.append(f"| [{path.stem}](../{room}/{path.name}) | {first} |")
        lines.append("")
    return "\n".join(lines)


def test_the_page_shows_the_rooms_as_they_are():
    made = {"picture": picture, "rooms": rooms}
    text = PAGE.read_text("utf-8")
    fresh = MARK.sub(lambda m: f"{m[1]}{made[m[2]]()}{m[3]}", text)
    if os.environ.get("ARCHITECTURE") == "write":
        PAGE.write_text(fresh, "utf-8")
        text = fresh
    assert len(MARK.findall(text)) == 2
    assert text == fresh


def test_every_file_it_names_is_there():
    for name in re.findall(r"`((?:sara_core|nodes|js|tests)/[\w/.]+)`", PAGE.read_text("utf-8")):
        assert (ROOT / name).exists(), name
