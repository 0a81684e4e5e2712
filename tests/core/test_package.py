"""What users get: the files of the archive, and what the registry's scan looks for in them."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

tomllib = pytest.importorskip("tomllib", reason="Python 3.11")

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = {"nodes", "sara_core", "js", "locales", "example_workflows"}
FILES = {"__init__.py", "requirements.txt", "README.md", "LICENSE", "NOTICE", "pyproject.toml"}
FORBIDDEN_IMPORTS = {"subprocess", "socket", "urllib", "http", "requests", "aiohttp", "pickle",
                     "marshal", "ctypes", "importlib", "runpy", "shelve"}  # fmt: skip
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__"}
FORBIDDEN_METHODS = {"system", "popen", "putenv", "exec_module", "fork", "environ"}


def tracked():
    """Files of the repository; in a copy without its history, all that look like them."""
    command = ["git", "-c", f"safe.directory={ROOT}", "-c", "core.quotePath=off", "ls-files"]
    if (ROOT / ".git").exists():
        listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
        return listed.stdout.splitlines()
    found = [path.relative_to(ROOT) for path in ROOT.rglob("*") if path.is_file()]
    passed_by = {"__pycache__", "output", ".pytest_cache", ".ruff_cache"}
    return [path.as_posix() for path in found if not passed_by & set(path.parts)]


def archive():
    """Files that .comfyignore leaves in; its patterns all begin at the root."""
    patterns = (ROOT / ".comfyignore").read_text().split()
    assert all(pattern.startswith("/") for pattern in patterns)
    kept = [
        path
        for path in tracked()
        if not any(
            f"/{path}".startswith(pattern) if pattern.endswith("/") else f"/{path}" == pattern
            for pattern in patterns
        )
    ]
    return sorted(kept)


def test_the_archive_holds_what_users_need_and_nothing_else():
    files = archive()
    assert {path.split("/")[0] for path in files if "/" in path} == FOLDERS
    assert {path for path in files if "/" not in path} == FILES
    assert any(path.startswith("js/docs/") for path in files)  # beside the docs left out
    size = sum((ROOT / path).stat().st_size for path in files)
    assert size < 5e6


ALLOWED = {
    "nodes/host/execution.py": {"aiohttp"},  # for the answer to a request
    "nodes/host/run_workflow.py": {"environ"},  # what torchrun says of the process, and its card
    "nodes/host/processes.py": {"environ"},
}


def test_there_are_five_addresses_and_one_of_them_changes_something():
    text = "".join((ROOT / path).read_text(encoding="utf-8") for path in shipped())
    assert re.findall(r"routes\.(\w+)", text) == ["post", "get", "get"]
    assert re.findall(r"aiohttp import (.*)", text) == ["web"]
    assert re.findall(r"\bweb\.(\w+)", text) == ["json_response", "Response", "Response"]
    assert re.findall(r"host\.add_route\((.*)\)", text) == [
        "page_state.PATH, page_state.everything",
        "folder_look.PATH, folder_look.look",
        "checkpoint_strip.PATH, checkpoint_strip.look",
        "wishes.PATH, wishes.ask, changes_something=True",
    ]
    assert re.findall(r"host\.add_picture_route\((.*)\)", text) == [
        "thumbnail.PATH, thumbnail.thumbnail"
    ]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "`/sara/shown`" in readme
    assert "`/sara/thumbnail`" in readme
    assert "`/sara/folder`" in readme
    assert "`/sara/checkpoints`" in readme
    assert "`/sara/ask`" in readme


def shipped():
    return [path for path in archive() if path.endswith(".py")]


@pytest.mark.parametrize("path", shipped())
def test_what_is_shipped_runs_nothing_and_reaches_nowhere(path):
    text = (ROOT / path).read_text(encoding="utf-8")
    text.encode("cp1252")  # read so where no one says otherwise
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names = {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names = {(node.module or "").split(".")[0]} if not node.level else set()
        else:
            names = set()
        assert not (names & FORBIDDEN_IMPORTS) - ALLOWED.get(path, set()), (path, names)
        if isinstance(node, ast.Call):
            assert getattr(node.func, "id", "") not in FORBIDDEN_CALLS, (path, node.lineno)
        if isinstance(node, ast.Attribute):
            assert node.attr not in FORBIDDEN_METHODS - ALLOWED.get(path, set()), (
                path,
                node.lineno,
            )


def test_the_scripts_import_only_what_the_frontend_keeps_stable():
    for path in (ROOT / "js").glob("*.js"):
        text = path.read_text(encoding="utf-8")
        imported = set(re.findall(r'from "([^"]+)"', text))
        allowed = {"../../scripts/app.js", "../../scripts/api.js"}
        allowed |= {f"./{other.name}" for other in (ROOT / "js").glob("*.js")}
        assert imported <= allowed, path
        assert not re.search(r"\beval\(|new Function|innerHTML|https?://", text), path


def test_the_registry_block_is_complete():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert re.fullmatch(r"[a-z][a-z0-9-]{0,99}", project["project"]["name"])
    assert "comfyui" not in project["project"]["name"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", project["project"]["version"])
    needed = (ROOT / "requirements.txt").read_text().split()
    assert project["project"]["dependencies"] == needed
    assert project["tool"]["comfy"]["requires-comfyui"] == ">=0.3.75"
    assert "web" not in project["tool"]["comfy"]  # would load every script twice
