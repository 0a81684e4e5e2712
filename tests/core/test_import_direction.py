"""sara_core must run where ComfyUI is not installed."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CORE = ROOT / "sara_core"
ALLOWED = {"torch", "safetensors", "numpy"} | set(sys.stdlib_module_names)
OPTIONAL = {"eight_bits": {"torchao"}}  # within a function, for those who ask for it
LAYERS = [
    {"atomic", "lock", "casts", "eight_bits"},
    {
        "magnitudes",
        "positions",
        "learning_rate",
        "objective",
        "batches",
        "low_rank",
        "adam_moments",
        "parameters",
        "in_place",
        "tracking",
        "out_of_memory",
        "buckets",
        "captions",
        "scatter",
        "transfer",
    },
    {
        "picture_folder",
        "checkpointing",
        "training_task",
        "selection",
        "config",
        "state_file",
        "delta_file",
        "fingerprint",
    },
    {"analysis", "delta", "sparse_weight", "encoding_cache"},
    {"convolution"},
    {"sparse_model", "export", "authors_format", "block_strengths"},
    {"optimizer"},
    {"trainer"},
    {"run_folder"},
    {"__init__"},
]


def imported(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((0, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names = [node.module] if node.module else [alias.name for alias in node.names]
            yield from ((node.level, name) for name in names)


@pytest.mark.parametrize("path", sorted(CORE.rglob("*.py")), ids=lambda p: p.name)
def test_core_imports_only_its_packages_and_lower_layers(path):
    rank = {name: i for i, layer in enumerate(LAYERS) for name in layer}
    own = rank[path.stem]
    for level, name in imported(path):
        if level == 0:
            allowed = ALLOWED | OPTIONAL.get(path.stem, set())
            assert name.split(".")[0] in allowed, f"{path.name} imports {name}"
        else:
            assert level == 1, f"{path.name} imports from outside the core"
            assert rank[name] < own, f"{path.name} imports {name}, which is not below it"


def test_it_is_imported_without_the_optional_packages():
    code = "import sys; import sara_core.optimizer; print(*sorted(sys.modules))"
    modules = subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True).split()
    assert not set.union(*OPTIONAL.values()) & set(modules)


def test_only_host_touches_comfyui():
    internals = {
        "comfy",
        "comfy_extras",
        "comfy_execution",
        "folder_paths",
        "server",
        "node_helpers",
    }
    for path in sorted((ROOT / "nodes").glob("*.py")):
        roots = {name.split(".")[0] for level, name in imported(path) if level == 0}
        assert not roots & internals, f"{path.name} imports {roots & internals}"


def test_host_knows_nothing_of_the_nodes():
    for path in sorted((ROOT / "nodes" / "host").glob("*.py")):
        above = [name for level, name in imported(path) if level == 2]
        assert not above, f"host/{path.name} imports {above} of the nodes"
