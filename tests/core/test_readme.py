import os
import re
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]


def test_the_script_in_the_readme_runs_and_restores_the_model(tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    scope = {}
    exec(compile(code, "README.md", "exec"), scope)  # noqa: S102
    assert os.path.getsize("learned.safetensors") > 0
    torch.manual_seed(0)
    fresh = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, 64))
    for a, b in zip(scope["model"].parameters(), fresh.parameters(), strict=True):
        assert torch.equal(a, b)


def test_files_the_readme_names_exist():
    text = (ROOT / "README.md").read_text()
    for path in re.findall(r"\]\(((?!http)[^)]+)\)", text):
        assert (ROOT / path).is_file(), path


def test_examples_the_readme_names_are_there():
    text = (ROOT / "README.md").read_text()
    named = re.findall(r"\*(\d [^*]+)\*", text)
    assert named
    for name in named:
        assert (ROOT / "example_workflows" / f"{name}.json").is_file(), name
