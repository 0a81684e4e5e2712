"""The checkpoints of a run, as they are shown and chosen from."""

import pytest

from ..harness.server import PromptError
from .browser import find_chromium
from .graphs import Graph, dataset, emoji64
from .test_browser import page  # noqa: F401


@pytest.fixture(scope="module")
def run(server):
    """A run with checkpoints of steps 2 and 4, the last of them the best, and previews."""
    graph = Graph(server)
    checkpoint, model, _ = emoji64(graph)
    data = dataset(graph, checkpoint)
    text = graph("CLIPTextEncode", clip=checkpoint.out(1), text="3d style, lemon")
    latent = graph("EmptySD3LatentImage", width=64, height=64, batch_size=1)
    sampling = graph(
        "SaraSampling", vae=checkpoint.out(2), positive=text, negative=text, seed=1, steps=1, cfg=1.0,
        sampler_name="euler", scheduler="simple", latent=latent,
    )  # fmt: skip
    graph(
        "SaraTrain", model=model, latents=data, positive=data.out(1), steps=6, batch_size=2,
        save_every_steps=2, keep_checkpoints=9, preview_every_steps=2, preview=sampling,
        output_name="strip",
    )  # fmt: skip
    graph.run()
    return "strip_00001"


def test_each_step_is_told_once_with_its_picture(server, run):
    told = server.get(f"/sara/checkpoints?name={run}")["checkpoints"]
    assert [(entry["step"], entry["best"]) for entry in told] == [(2, False), (3, False), (4, False), (6, False)]  # fmt: skip
    assert all(entry["picture"].startswith("data:image/") for entry in told)
    assert "no folder 'nothing'" in server.get("/sara/checkpoints?name=nothing")["error"]
    assert "error" in server.get("/sara/checkpoints?name=../..")


def test_the_steps_that_are_named_are_loaded(server, run):
    graph = Graph(server)
    some = graph("SaraLoadCheckpoints", run=run, steps="4, 2")
    every = graph("SaraLoadCheckpoints", run=run)
    for node in (some, every):
        graph("PreviewAny", source=node.out(1))
    outputs = graph.run()
    assert outputs[some]["text"][0] == "2 deltas"
    assert outputs[every]["text"][0] == "4 deltas"
    broken = server.base / "output" / "sara" / run / "checkpoint_0000005_steps.safetensors"
    broken.write_bytes(b"cut off")
    assert [line.split(":")[0] for line in server.get(f"/sara/checkpoints?name={run}")["broken"]] == [broken.name]  # fmt: skip
    wrong = Graph(server)
    wrong("PreviewAny", source=wrong("SaraLoadCheckpoints", run=run, steps="5").out(1))
    with pytest.raises(PromptError, match=f"there are 2, 3, 4, 6; {broken.name}"):
        wrong.run()
    broken.unlink()
    for steps, message in (("5", "no checkpoint of step 5; there are 2, 3, 4, 6"), ("last", "steps holds 'last'")):  # fmt: skip
        wrong = Graph(server)
        wrong("PreviewAny", source=wrong("SaraLoadCheckpoints", run=run, steps=steps).out(1))
        with pytest.raises(PromptError, match=message):
            wrong.run()


@pytest.mark.skipif(find_chromium() is None, reason="needs chromium and chromedriver")
def test_a_click_on_a_picture_chooses_its_step(page, run):  # noqa: F811
    page.js(
        """window.app.graph.clear();
        const node = LiteGraph.createNode("SaraLoadCheckpoints");
        window.app.graph.add(node);
        node.pos = [100, 100];"""
    )
    page.command("Comfy.RefreshNodeDefinitions")
    page.set_widgets("SaraLoadCheckpoints", run=run)
    box = page.box("SaraLoadCheckpoints")
    page.wait("return arguments[0].querySelectorAll('button img').length === 4", box)
    page.wait("return arguments[0].innerText.includes('all 4 are loaded')", box)

    def steps():
        return page.js(
            "return window.app.graph.nodes.find((n) => n.type === 'SaraLoadCheckpoints')"
            ".widgets.find((w) => w.name === 'steps').value"
        )

    def click(step):
        page.js(f"arguments[0].querySelector('button[data-step=\"{step}\"]').click()", box)

    click(6)
    click(2)
    assert steps() == "2, 6"
    assert "2 of 4 are loaded" in page.text("SaraLoadCheckpoints")
    click(6)
    assert steps() == "2"
    page.set_widgets("SaraLoadCheckpoints", steps="3, 4")  # as typed
    page.wait("return arguments[0].querySelectorAll('button[aria-pressed=true]').length === 2", box)
    page.set_widgets("SaraLoadCheckpoints", steps="3, 77")  # of another run
    page.set_widgets("SaraLoadCheckpoints", run=run)
    page.wait("return arguments[0].innerText.includes('step 77 (?)')", box)
    click(77)
    assert steps() == "3"
    page.set_widgets("SaraLoadCheckpoints", steps="")
    page.wait("return arguments[0].innerText.includes('all 4 are loaded')", box)
    assert page.errors() == []
