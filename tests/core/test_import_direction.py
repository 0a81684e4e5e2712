"""Which room may import which, and that sara_core runs where ComfyUI is not installed."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {"torch", "safetensors", "numpy"} | set(sys.stdlib_module_names)
OPTIONAL = {
    "eight_bits": {"torchao"},
    "packages": {"prodigyopt", "schedulefree"},
}  # within a function, for those who ask for it
INTERNALS = {"comfy", "comfy_extras", "comfy_execution", "folder_paths", "server", "node_helpers"}
ROOMS = {  # each may import itself and these; nodes all of the core as well
    "sara_core/weights": set(),
    "sara_core/files": set(),
    "sara_core/delta": {"sara_core/weights", "sara_core/files"},
    "sara_core/pictures": {"sara_core/files"},
    "sara_core/optimizer": {"sara_core/weights", "sara_core/delta"},
    "sara_core/training": {
        "sara_core/weights",
        "sara_core/files",
        "sara_core/delta",
        "sara_core/optimizer",
    },
    "nodes/host": set(),
    "nodes/analysis": {"nodes", "nodes/host"},
    "nodes/delta": {"nodes", "nodes/host"},
    "nodes/sampling": {"nodes", "nodes/host", "nodes/delta"},
    "nodes/training": {"nodes", "nodes/host", "nodes/sampling"},
    "nodes/pictures": {"nodes", "nodes/host", "nodes/training"},
}


def imported(path):
    """Level, module or package, and names of each import in a file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((0, alias.name, []) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.level, node.module or "", [alias.name for alias in node.names]


def modules_imported(path):
    """Files of the repository that a file imports."""
    for level, module, names in imported(path):
        if level == 0:
            continue
        base = path.parents[level - 1].joinpath(*module.split(".") if module else ())
        if base.with_suffix(".py").is_file():
            yield base.with_suffix(".py")
            continue
        for name in names:
            candidates = base / f"{name}.py", base / name / "__init__.py", base / "__init__.py"
            yield next(file for file in candidates if file.is_file())


def room_of(path):
    return path.parent.relative_to(ROOT).as_posix()


def files(folder):
    return sorted((ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("path", files("sara_core"), ids=lambda p: p.name)
def test_the_core_imports_its_packages_alone(path):
    allowed = PACKAGES | OPTIONAL.get(path.stem, set())
    for level, module, _ in imported(path):
        assert level or module.split(".")[0] in allowed, f"{path.name} imports {module}"
    for target in modules_imported(path):
        assert target.is_relative_to(ROOT / "sara_core"), f"{path.name} imports {target}"


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_those_below_it(room):
    for path in (ROOT / room).glob("*.py"):
        for target in modules_imported(path):
            is_core = room.startswith("nodes") and room_of(target).startswith("sara_core")
            assert is_core or room_of(target) in {room, *ROOMS[room]}, f"{path} imports {target}"


def test_imports_run_one_way():
    graph = {path: set(modules_imported(path)) for path in files("sara_core") + files("nodes")}
    list(TopologicalSorter(graph).static_order())  # raises on a cycle


def test_it_is_imported_without_the_optional_packages():
    code = "import sys; import sara_core; print(*sorted(sys.modules))"
    modules = subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True).split()
    assert not set.union(*OPTIONAL.values()) & set(modules)


def test_only_host_touches_comfyui():
    for path in files("nodes"):
        if room_of(path) != "nodes/host":
            roots = {module.split(".")[0] for level, module, _ in imported(path) if level == 0}
            assert not roots & INTERNALS, f"{path.name} imports {roots & INTERNALS}"


def test_what_the_rooms_of_nodes_share_knows_none_of_them():
    for path in (ROOT / "nodes").glob("[!_]*.py"):
        for target in modules_imported(path):
            is_core = room_of(target).startswith("sara_core")
            assert is_core or room_of(target) in {"nodes", "nodes/host"}, f"{path} imports {target}"
