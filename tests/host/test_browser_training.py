"""What people see of a training while it runs, and what they can ask of it, in a real browser."""

import time
from pathlib import Path

import pytest

from ..harness.workflows import TRAIN, load_workflow, node_titled
from .browser import find_chromium
from .test_browser import WORKFLOWS, first_training, idle, no_errors_of_ours, page  # noqa: F401

pytestmark = pytest.mark.skipif(find_chromium() is None, reason="needs chromium and chromedriver")

TEXT_OF = """const box = (node) => node.widgets.find((w) => w.type === "sara_chart").element;
const text = (node) => box(node).textContent;"""


def test_the_loss_and_previews_appear_while_it_trains(page):
    first_training(page, steps=400, preview_every_steps=20)
    page.command("Comfy.QueuePrompt")
    box = page.box("SaraTrain")
    step = "Number(/step (\\d+) of 400/.exec(arguments[0].innerText)?.[1] ?? 0)"
    first = page.wait(f"const s = {step}; return s > 1 && s", box)
    page.wait(f"return {step} > arguments[1] + 5", box, first)
    page.show("SaraTrain")
    page.wait("return arguments[0].querySelectorAll('.sara-previews img').length >= 2", box)
    page.wait(
        "return [...arguments[0].querySelectorAll('.sara-previews img')]"
        ".every((i) => i.complete && i.naturalWidth === 4 * 64 + 3 * 4)",
        box,
    )
    assert page.inked("SaraTrain") > 0.01
    assert (0x4A, 0xA3, 0xFF) in {colour for _, colour in page.colours("SaraTrain")}
    text = page.text("SaraTrain")
    for part in ("fluent3d_", ": training", "stage 1", "(smoothed)", "per step", "left", "memory",
                 "20 times over the pictures", "needs ", "for activations"):  # fmt: skip
        assert part in text, text

    page.reopen()  # the state comes from the server
    box = page.box("SaraTrain")
    again = page.wait(f"const s = {step}; return s > 1 && s", box)
    assert again > first
    page.wait("return arguments[0].querySelectorAll('.sara-previews img').length >= 2", box)
    page.command("Comfy.Interrupt")
    page.wait("return /: cancelled/.test(arguments[0].innerText)", box)
    assert "To go on, choose fluent3d_" in page.text("SaraTrain")
    idle(page)
    page.reopen()  # what is told of a stopped run is still there
    box = page.box("SaraTrain")
    page.wait("return /: cancelled/.test(arguments[0].innerText)", box)
    assert "To go on, choose fluent3d_" in page.text("SaraTrain")
    assert page.errors() == []


def test_queue_after_queue_and_a_reload_show_the_last_run(page):
    by_script = load_workflow(page.server, TRAIN)
    train = node_titled(by_script, "SaRA Train")
    by_script[train]["inputs"].update(steps=2, batch_size=2)
    kept = ("CheckpointLoaderSimple", "SaraImageFolder")
    del by_script[train]["inputs"]["preview"]
    page.server.run({k: n for k, n in by_script.items() if n["class_type"] in kept or k == train})
    first_training(page)
    for _ in range(2):
        page.command("Comfy.QueuePrompt")
        idle(page)
        box = page.box("SaraTrain")
        page.wait("return /finished, step 6 of 6/.test(arguments[0].innerText)", box)
    page.reopen()
    box = page.box("SaraTrain")
    page.wait("return /finished, step 6 of 6/.test(arguments[0].innerText)", box)
    page.drop(WORKFLOWS / f"{TRAIN}.json")  # a workflow of its own, though of the same template
    time.sleep(1)
    assert "finished" not in page.text("SaraTrain")


def test_the_chart_turns_over_to_the_loss_by_noise_level(page):
    first_training(page, steps=40)
    page.command("Comfy.QueuePrompt")
    idle(page)
    box = page.box("SaraTrain")
    page.wait("return /finished, step 40 of 40/.test(arguments[0].innerText)", box)
    turn = "arguments[0].querySelector('.sara-turn')"
    page.wait(f"return {turn}.innerText === 'by noise level'", box)
    page.show("SaraTrain")
    lines = page.inked("SaraTrain")
    page.js(f"{turn}.click()", box)
    page.wait(f"return {turn}.innerText === 'over the steps'", box)
    assert page.inked("SaraTrain") > 2 * lines
    assert {(0x4A, 0xA3, 0xFF), (0xFF, 0x9F, 0x40)} <= {c for _, c in page.colours("SaraTrain")}
    page.js(f"{turn}.click()", box)
    page.wait(f"return {turn}.innerText === 'by noise level'", box)
    assert page.inked("SaraTrain") == pytest.approx(lines, rel=0.1)
    assert page.errors() == []


def test_two_training_nodes_show_a_run_each(page):
    first_training(page)
    page.js(
        """const graph = window.app.graph, one = graph.nodes.find((n) => n.type === "SaraTrain");
        const other = LiteGraph.createNode("SaraTrain");
        other.pos = [one.pos[0], one.pos[1] + 2000];
        graph.add(other);
        for (const input of one.inputs) {
          const link = input.link == null ? null : graph.links.get?.(input.link) ?? graph.links[input.link];
          if (!link || input.name === "threshold") continue;
          const slot = other.inputs.findIndex((i) => i.name === input.name);
          graph.getNodeById(link.origin_id).connect(link.origin_slot, other, slot);
        }
        for (const [name, value] of [["steps", 4], ["batch_size", 2], ["output_name", "second"]])
          other.widgets.find((w) => w.name === name).value = value;"""
    )
    page.command("Comfy.QueuePrompt")
    found = page.wait(
        TEXT_OF
        + """const all = window.app.graph.nodes.filter((n) => n.type === "SaraTrain").map(text);
        const ends = [/finished, step 6 of 6/, /finished, step 4 of 4/];  // not those of a run before
        return all.every((t, i) => ends[i].test(t)) && all;"""
    )
    assert "fluent3d_" in found[0]
    assert "second_" in found[1]
    idle(page)


def test_a_training_node_in_a_subgraph_shows_its_run(page):
    first_training(page)
    page.js(
        """const node = window.app.graph.nodes.find((n) => n.type === "SaraTrain");
        window.app.canvas.graph.convertToSubgraph(new Set([node]));"""
    )
    inner = (
        TEXT_OF
        + """const outer = window.app.graph.nodes.find((n) => n.subgraph);
        const node = outer.subgraph.nodes.find((n) => n.type === "SaraTrain");"""
    )
    page.command("Comfy.QueuePrompt")
    told = page.wait(inner + "return /finished, step 6 of 6/.test(text(node)) && text(node)")
    assert "fluent3d_" in told
    idle(page)
    page.js(inner + "window.app.canvas.openSubgraph(outer.subgraph, outer);")
    page.wait(inner + "return document.body.contains(box(node))")
    page.js("window.app.canvas.setGraph(window.app.graph)")


def test_what_is_asked_in_the_page_is_done(page):
    first_training(page, steps=2000, preview_every_steps=0, save_every_steps=0, progressive=0)
    page.command("Comfy.QueuePrompt")
    box = page.box("SaraTrain")
    step = "Number(/step (\\d+) of 2000/.exec(arguments[0].innerText)?.[1] ?? 0)"
    page.wait(f"return {step} > 1", box)
    button = "arguments[0].querySelector('.sara-wishes [data-wish=' + arguments[1] + ']')"
    shown = f"{button}.getBoundingClientRect().height > 10"
    for wish in ("save", "preview", "end"):
        assert page.js(f"return {shown}", box, wish), wish
    pictures = "arguments[0].querySelectorAll('.sara-previews img').length"
    before = page.js(f"return {pictures}", box)
    page.js(f"{button}.click()", box, "preview")
    page.wait(f"return {pictures} > arguments[1]", box, before)
    page.js(f"{button}.click()", box, "save")
    run = page.wait("return /fluent3d_\\d+/.exec(arguments[0].innerText)?.[0]", box)
    folder = Path(page.server.base, "output", "sara", run)
    deadline = time.time() + 60
    while time.time() < deadline and not list(folder.glob("checkpoint_*")):
        time.sleep(0.1)
    assert list(folder.glob("checkpoint_*"))
    page.js(f"{button}.click()", box, "end")
    page.wait("return /: finished, step/.test(arguments[0].innerText)", box)
    last = page.js(f"return {step}", box)
    assert 1 < last < 2000
    assert f"ended after step {last} of 2000: as asked" in page.text("SaraTrain")
    assert page.js(f"return !({shown})", box, "end")
    idle(page)
    assert (folder / f"fluent3d_{last}_steps.safetensors").is_file()


def test_buttons_and_warnings_are_in_view_without_previews(page):
    first_training(page, steps=2000, save_every_steps=0, progressive=0, batch_size=2)
    page.js(
        """const node = window.app.graph.nodes.find((n) => n.type === "SaraTrain");
        node.disconnectInput(node.inputs.findIndex((i) => i.name === "preview"));
        node.setSize([node.size[0], node.computeSize()[1]]);"""
    )
    page.command("Comfy.QueuePrompt")
    box = page.box("SaraTrain")
    page.wait("return / 2000, stage/.test(arguments[0].innerText)", box)
    page.wait("return arguments[0].querySelector('.sara-turn')?.offsetHeight > 0", box)
    page.show("SaraTrain")
    met = """const part = arguments[0].querySelector(arguments[1]);
        const { left, top, width, height } = part.getBoundingClientRect();
        const seen = document.elementFromPoint(left + width / 2, top + height - 3);
        return part.contains(seen);"""
    for part in ("[data-wish=save]", "[data-wish=end]", ".sara-turn"):
        assert page.js(met, box, part), part
    page.js("arguments[0].querySelector('[data-wish=end]').click()", box)
    page.wait("return /: finished, step/.test(arguments[0].innerText)", box)
    page.wait("return arguments[0].querySelector('.sara-warnings').offsetHeight > 0", box)
    assert page.js(met, box, ".sara-warnings")
    idle(page)
