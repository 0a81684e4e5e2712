"""A stranger's first run: from the template menu to a trained delta by setting checkpoint, folder and name.

Steps are lowered as well, for the time they take on a processor at 512 pixels.
"""

import pytest
from PIL import Image

from sara_core import SparseDelta

from ..harness.environment import ASSETS
from ..harness.server import Server, make_base
from ..harness.workflows import TRAIN
from .browser import Page, find_chromium
from .models import write_mini_checkpoint

pytestmark = [
    pytest.mark.skipif(find_chromium() is None, reason="needs chromium and chromedriver"),
    pytest.mark.slow,
]
CLICK = """const found = [...document.querySelectorAll(arguments[0])]
  .filter((e) => e.textContent.trim().startsWith(arguments[1]) && e.offsetParent);
found.sort((a, b) => a.textContent.length - b.textContent.length)[0]?.click();
return found.length > 0;"""


@pytest.fixture(scope="module", params=["classic"])
def page(request, tmp_path_factory):
    base = tmp_path_factory.mktemp("stranger")
    make_base(base)
    write_mini_checkpoint(base / "models" / "checkpoints" / "my_model.safetensors")
    folder = base / "input" / "my pictures"
    folder.mkdir()
    for source in sorted((ASSETS / "fluent3d").glob("*.png"))[:4]:
        Image.open(source).convert("RGB").resize((512, 512)).save(folder / source.name)
        (folder / f"{source.stem}.txt").write_text(source.with_suffix(".txt").read_text())
    with Server(base) as server:
        opened = Page(server, request.param)
        yield opened
        opened.close()


def test_three_settings_lead_from_the_template_menu_to_a_delta(page):
    page.command("Comfy.BrowseTemplates")
    page.wait(CLICK, "[role=dialog] *", "ComfyUI-SaRA")
    page.wait(CLICK, "[role=dialog] *", TRAIN)
    page.wait("return window.app.graph.nodes.some((n) => n.type === 'SaraTrain')")
    page.wait("return !document.querySelector('[role=dialog]')?.textContent.includes('Templates')")
    page.dismiss()
    assert page.js("return window.app.graph.nodes.length") <= 8
    page.set_widgets("CheckpointLoaderSimple", ckpt_name="my_model.safetensors")
    page.set_widgets("SaraImageFolder", folder="input/my pictures")
    page.set_widgets("SaraTrain", output_name="my_style", steps=6)
    page.set_widgets("SaraSampling", steps=2)
    page.wait(
        "return arguments[0].innerText.includes('4 pictures, 4 captions from .txt')",
        page.box("SaraImageFolder"),
    )
    page.command("Comfy.QueuePrompt")
    box = page.box("SaraTrain")
    page.wait("return /finished, step 6 of 6/.test(arguments[0].innerText)", box)
    page.wait("return arguments[0].querySelectorAll('.sara-previews img').length === 2", box)
    page.wait(
        "return window.app.graph.nodes.find((n) => n.type === 'SaraCompare').imgs?.length === 1"
        " || document.querySelectorAll('.image-preview img').length >= 1"
    )
    run = page.server.base / "output" / "sara" / "my_style_00001"
    delta = SparseDelta.load(run / "my_style_6_steps.safetensors")
    assert delta.metadata["modelspec.architecture"] == "sd15/sara"
    assert max(float(entry.values.abs().max()) for entry in delta.entries.values()) > 1e-4
    with Image.open(run / "previews" / "preview_0000006_steps.png") as preview:
        assert preview.size == (512, 512)  # what SD1.5 was trained at; no one had to say so
    assert page.errors() == []
