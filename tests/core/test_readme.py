import os
import re
from pathlib import Path

import pytest
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


def anchors(page):
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("js/docs/*.md")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_links_to_exists(page):
    links = re.findall(r"\]\(((?!http)[^)]+)\)", page.read_text())
    for path, anchor in (link.partition("#")[::2] for link in links):
        target = page.parent / path if path else page
        assert target.is_file(), path
        assert not anchor or anchor in anchors(target), f"{path}#{anchor}"


def test_examples_the_readme_names_are_there():
    text = (ROOT / "README.md").read_text()
    named = re.findall(r"\*(\d [^*]+)\*", text)
    assert named
    for name in named:
        assert (ROOT / "example_workflows" / f"{name}.json").is_file(), name
