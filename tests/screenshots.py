"""Take the pictures of the help pages and of the workflow templates, in a real browser.

usage: python dev.py screenshots
"""

import io
import shutil
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image

from .examples.families import FAMILY_SPECS
from .harness.server import Server, make_base
from .harness.workflows import TRAIN, USE
from .host.browser import Page

ROOT = Path(__file__).resolve().parents[1]
HELP, EXAMPLES = ROOT / "js" / "docs" / "images", ROOT / "example_workflows"
RESUME = "3 Stop and go on"
NOT_RUN = ("7 With a LoRA and a ControlNet", *FAMILY_SPECS)
STEPS = 300
SHORTER = {"SaraTrain": {"steps": STEPS, "preview_every_steps": 100, "validation_split": 0.1,
                         "validate_every_steps": 25, "save_every_steps": 100}}  # fmt: skip
STAND_INS = (  # named in an example, never loaded
    "checkpoints/v1-5-pruned-emaonly-fp16.safetensors", "loras/your_lora.safetensors",
    "controlnet/control_v11p_sd15_scribble_fp16.safetensors",
    *(
        f"{model['directory']}/{model['name']}"
        for nodes in FAMILY_SPECS.values()
        for node in nodes.values()
        for model in node["models"]
    ),
)  # fmt: skip
FURTHER = {  # nodes that no example has, with the Load SaRA Delta they are connected to
    "SaraBlockStrengths": {"strengths": "joint_blocks.0: 0.5\njoint_blocks.[23]: 0"},
    "SaraCreateHook": {},
    "SaraExportDelta": {"format": "LoRA (approximate)"},
}
ALONE = {  # nodes that no example has, by themselves; the first is run
    "SaraCompareRuns": {"run": "fluent3d_00001", "others": "*"},
    "SaraImportCheckpoint": {},
    "SaraJoinPictures": {},
    "SaraReferencePictures": {"folder": "input/fluent3d"},
    "SaraPrompts": {"prompts": "3d style, fox\n3d style, lemon", "before": "emoji, "},
    "SaraVideoFolder": {"folder": "input/films"},
}


def save(image, path, longest):
    """Write a JPEG of at most so many pixels a side."""
    image.thumbnail((longest, longest), Image.LANCZOS)
    image.save(path, "JPEG", quality=82, optimize=True)


def region(page, left, top, width, height):
    """Cut a part of the graph, in its own coordinates, out of a screenshot of the window."""
    canvas = page.js(
        "const c = document.getElementById('graph-canvas').getBoundingClientRect();"
        "return [c.left, c.top, window.app.canvas.ds.scale, ...window.app.canvas.ds.offset]"
    )
    x0, y0, scale, dx, dy = canvas
    x, y = x0 + (left + dx) * scale, y0 + (top + dy) * scale
    image = Image.open(io.BytesIO(page.driver.get_screenshot_as_png())).convert("RGB")
    box = (x, y, x + width * scale, y + height * scale)
    return image.crop(tuple(round(max(0, edge)) for edge in box))


def fit(page, left, top, width, height):
    """Show a part of the graph as large as the window allows, below its bars."""
    page.js(
        """const [left, top, width, height] = arguments, view = window.app.canvas.ds;
        view.scale = Math.min(1, 2200 / width, 1300 / height);
        view.offset[0] = 120 / view.scale - left;
        view.offset[1] = 120 / view.scale - top;
        window.app.canvas.setDirty(true, true);""",
        left, top, width, height,
    )  # fmt: skip
    time.sleep(1)


def bounds(page, kind=None):
    """Left, top, width and height of a node, or of all of them."""
    return page.js(
        """const nodes = window.app.graph.nodes.filter((n) => !arguments[0] || n.type === arguments[0]);
        const all = nodes.slice(0, arguments[0] ? 1 : undefined).map((n) => n.boundingRect ?? n.getBounding());
        const left = Math.min(...all.map((r) => r[0])), top = Math.min(...all.map((r) => r[1]));
        return [left, top, Math.max(...all.map((r) => r[0] + r[2])) - left,
                Math.max(...all.map((r) => r[1] + r[3])) - top];""",
        kind,
    )


def take(page, kind=None, margin=12):
    """Show and cut out a node, or the whole graph."""
    left, top, width, height = bounds(page, kind)
    place = left - margin, top - margin, width + 2 * margin, height + 2 * margin
    fit(page, *place)
    return region(page, *place)


def run(page, server):
    """Queue what is shown, and wait for its end."""
    page.command("Comfy.QueuePrompt")
    time.sleep(1)
    while any(server.get("/queue").values()):
        time.sleep(0.3)
    time.sleep(2)


def choose_what_was_trained(page, server):
    """Choose the first training's delta and run in the nodes that load one."""
    page.command("Comfy.RefreshNodeDefinitions")
    runs = server.base / "output" / "sara"
    (made,) = runs.glob("fluent3d_00001/fluent3d_*_steps.safetensors")
    page.set_widgets("SaraLoadDelta", delta_name=made.relative_to(runs).as_posix())
    page.set_widgets("SaraLoadCheckpoints", run="fluent3d_00001")


def pictures_made(server):
    """Pictures that the last workflow has saved or compared, beside each other."""
    (entry,) = server.get("/history?max_items=1").values()
    kinds = {number: node["class_type"] for number, node in entry["prompt"][2].items()}
    found = [
        Image.open(io.BytesIO(server.picture(image))).convert("RGB")
        for number, output in entry["outputs"].items()
        if kinds[number] in ("SaveImage", "SaraCompare")
        for image in output.get("images", [])
    ]
    columns = min(4, len(found))
    width, height = found[0].size
    sheet = Image.new("RGB", (columns * width, -(-len(found) // columns) * height), "white")
    for i, picture in enumerate(found):
        sheet.paste(picture, (i % columns * width, i // columns * height))
    times = max(1, round(600 / sheet.width))
    return sheet.resize((times * sheet.width, times * sheet.height), Image.Resampling.LANCZOS)


def example(page, server, name):
    """Load and run an example; take its nodes, and what it makes as its thumbnail."""
    page.drop(EXAMPLES / f"{name}.json")
    if name not in FAMILY_SPECS:
        page.set_for_the_small_model()
        for kind, values in SHORTER.items():
            page.set_widgets(kind, **values)
    if name not in (TRAIN, *FAMILY_SPECS):
        choose_what_was_trained(page, server)
    thumbnail = EXAMPLES / f"{name}.jpg"
    if name not in NOT_RUN:
        run(page, server)
    if name == TRAIN:
        page.show("SaraTrain")
        shown = Image.open(io.BytesIO(page.box("SaraTrain").screenshot_as_png)).convert("RGB")
        save(shown, ROOT / "docs" / "images" / "training.jpg", 900)
    if name in NOT_RUN or name == RESUME:
        save(take(page), thumbnail, 900)
    else:
        save(pictures_made(server), thumbnail, 640)
    for kind in page.js("return [...new Set(window.app.graph.nodes.map((n) => n.type))]"):
        if kind.startswith("Sara") and not (HELP / f"{kind}.jpg").exists():
            save(take(page, kind), HELP / f"{kind}.jpg", 1200)


def further(page, server):
    """Take the nodes that are in no example, each connected to a loaded delta."""
    page.drop(EXAMPLES / f"{USE}.json")
    page.set_for_the_small_model()
    choose_what_was_trained(page, server)
    for number, (kind, values) in enumerate(FURTHER.items()):
        page.js(
            """const node = LiteGraph.createNode(arguments[0]);
            node.pos = [2600, 700 * arguments[1]];
            window.app.graph.add(node);
            window.app.graph.nodes.find((n) => n.type === "SaraLoadDelta").connect(0, node, 0);""",
            kind, number,
        )  # fmt: skip
        page.set_widgets(kind, **values)
    for number, (kind, values) in enumerate(ALONE.items()):
        page.js(
            """const node = LiteGraph.createNode(arguments[0]);
            node.pos = [3600, 900 * arguments[1]];
            node.mode = arguments[1] ? 4 : 0;
            window.app.graph.add(node);""",
            kind, number,
        )  # fmt: skip
        page.set_widgets(kind, **values)
    run(page, server)
    page.js("for (const node of window.app.graph.nodes) node.mode = 0")
    for kind in (*FURTHER, *ALONE):
        save(take(page, kind), HELP / f"{kind}.jpg", 900)


def main():
    """Take all of them anew."""
    HELP.mkdir(exist_ok=True)
    for old in (*HELP.glob("*.jpg"), *EXAMPLES.glob("*.jpg")):
        old.unlink()
    with tempfile.TemporaryDirectory() as base:
        make_base(Path(base))
        for name in STAND_INS:
            (Path(base) / "models" / name).parent.mkdir(exist_ok=True)
            (Path(base) / "models" / name).touch()
        shutil.copy(Path(base, "input", "fluent3d", "bat.png"), Path(base, "input", "example.png"))
        pictures = Path(base, "input", "fluent3d")
        film = Path(base, "input", "films", "fox")
        film.mkdir(parents=True)
        for number in range(8):
            shutil.copy(pictures / "fox.png", film / f"{number}.png")
        shutil.copy(pictures / "fox.txt", film.with_suffix(".txt"))
        with Server(base, sys.argv[1:]) as server:
            page = Page(server, "vue")
            page.js("document.querySelectorAll('.litegraph-minimap').forEach((e) => e.remove())")
            names = sorted(path.stem for path in EXAMPLES.glob("*.json"))
            for name in names:
                if name == RESUME:
                    SHORTER["SaraTrain"]["steps"] = 40
                example(page, server, name)
            further(page, server)
            page.close()


if __name__ == "__main__":
    main()
