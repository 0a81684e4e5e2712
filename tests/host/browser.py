"""ComfyUI's page in a real Chromium, driven by Selenium."""

import contextlib
import json
import shutil
import time

from ..harness.workflows import PROMPT, SMALL


def find_chromium():
    """Paths of the browser and its driver, None where there is none."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    driver = shutil.which("chromedriver")
    return (browser, driver) if browser and driver else None


class Page:
    """One tab that shows a server's page."""

    def __init__(self, server, renderer):
        from selenium import webdriver
        from selenium.webdriver.chrome.options import Options
        from selenium.webdriver.chrome.service import Service

        self.server = server
        browser, driver = find_chromium()
        options = Options()
        options.binary_location = browser
        for argument in (
            "--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=2400,1600",
            "--disable-dev-shm-usage",
        ):  # fmt: skip
            options.add_argument(argument)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        self.driver = webdriver.Chrome(options=options, service=Service(driver))
        server.post("/settings/Comfy.TutorialCompleted", True)
        server.post("/settings/Comfy.VueNodes.Enabled", renderer == "vue")
        self.open()

    def open(self):
        """Load the page and wait for the graph."""
        self.driver.get(f"http://127.0.0.1:{self.server.port}/")
        self.wait("return !!(window.app?.graph && window.app.extensionManager)")
        self.wait("return !!LiteGraph.registered_node_types.SaraTrain")
        time.sleep(1)

    def close(self):
        """End the browser."""
        with contextlib.suppress(Exception):
            self.driver.quit()

    def js(self, script, *arguments):
        """Run a script, return what it returns."""
        return self.driver.execute_script(script, *arguments)

    def later(self, script, *arguments):
        """Run an async function's body and return what it comes to."""
        wrapped = (
            "const done = arguments[arguments.length - 1], given = [...arguments].slice(0, -1);"
            f"(async (...arguments_) => {{ const args = arguments_; {script} }})(...given)"
            ".then((value) => done({ value }), (error) => done({ error: String(error) }));"
        )
        answer = self.driver.execute_async_script(wrapped, *arguments)
        assert "error" not in answer, answer
        return answer.get("value")

    def wait(self, script, *arguments, seconds=90):
        """Wait until a script returns something true; returns it.

        It gives up when the server has had nothing to do for so many seconds: how long a workflow
        takes depends on what else the machine does.
        """
        from selenium.common.exceptions import JavascriptException

        deadline, last = time.time() + seconds, None
        while time.time() < deadline:
            if self.server.get("/queue")["queue_running"]:
                deadline = time.time() + seconds
            try:
                last = self.js(script, *arguments)
            except JavascriptException as error:  # the page is still being built
                last = error
            if last and not isinstance(last, Exception):
                return last
            time.sleep(0.2)
        raise AssertionError(f"still {last!r} after {seconds} s: {script}")

    def drop(self, path):
        """Drop a workflow file onto the canvas."""
        self._drop(path.read_text(encoding="utf-8"), path.name)

    def reopen(self):
        """Open the page anew with the workflow as it was, as after a reload."""
        text = self.js("return JSON.stringify(window.app.graph.serialize())")
        self.open()
        self._drop(text, "reopened.json")

    def _drop(self, text, name):
        self.js("window.before = window.app.graph.nodes[0]")
        self.js(
            """const data = new DataTransfer();
            data.items.add(new File([arguments[0]], arguments[1], { type: "application/json" }));
            const canvas = document.getElementById("graph-canvas");
            for (const type of ["dragover", "drop"])
              canvas.dispatchEvent(new DragEvent(type, { dataTransfer: data, bubbles: true,
                cancelable: true, clientX: 800, clientY: 500 }));""",
            text,
            name,
        )
        saved = json.loads(text)
        self.wait(
            "const { id, nodes } = window.app.graph;"
            "return (arguments[0] ?? id) === id && nodes.length === arguments[1] && nodes[0] !== window.before",
            saved.get("id"),
            len(saved["nodes"]),
        )
        time.sleep(0.5)
        self.dismiss()

    def dismiss(self):
        """Close dialogs, such as the one that offers models a workflow names."""
        from selenium.webdriver.common.keys import Keys

        dialogs = "return [...document.querySelectorAll('[role=dialog]')].length"
        while self.js(dialogs):
            self.driver.switch_to.active_element.send_keys(Keys.ESCAPE)
            time.sleep(0.5)

    def set_widgets(self, kind, **values):
        """Set widgets of all nodes of a kind."""
        self.js(
            """for (const node of window.app.graph.nodes.filter((n) => n.type === arguments[0]))
              for (const [name, value] of Object.entries(arguments[1])) {
                const widget = node.widgets.find((w) => w.name === name);
                widget.value = value;
                widget.callback?.(value);
              }""",
            kind,
            values,
        )

    def set_for_the_small_model(self):
        """Set all widgets as `workflows.load_workflow` does."""
        for kind, values in SMALL.items():
            self.set_widgets(kind, **values)
        self.js(
            """const graph = window.app.graph;
            for (const node of graph.nodes.filter((n) => n.type === "CLIPTextEncode")) {
              const text = node.widgets.find((w) => w.name === "text");
              if (text.value.includes("fox")) text.value = arguments[0];
            }
            for (const node of graph.nodes.filter((n) => n.type === "SaraSampling")) {
              const latent = LiteGraph.createNode("EmptyLatentImage");
              latent.pos = [node.pos[0], node.pos[1] + 400];
              graph.add(latent);
              for (const [name, value] of Object.entries(arguments[1]))
                latent.widgets.find((w) => w.name === name).value = value;
              latent.connect(0, node, node.inputs.findIndex((i) => i.name === "latent"));
            }""",
            PROMPT,
            SMALL["EmptyLatentImage"],
        )

    def widget(self, kind, name):
        """Value of a widget of the first node of a kind."""
        return self.js(
            "return window.app.graph.nodes.find((n) => n.type === arguments[0])"
            ".widgets.find((w) => w.name === arguments[1]).value",
            kind,
            name,
        )

    def show(self, kind):
        """Bring a node into the middle of the window, unzoomed."""
        self.js(
            """const node = window.app.graph.nodes.find((n) => n.type === arguments[0]);
            const view = window.app.canvas.ds;
            view.scale = 1;
            view.offset[0] = 500 - node.pos[0];
            view.offset[1] = 120 - node.pos[1] - Math.max(0, node.size[1] - 1300);
            window.app.canvas.setDirty(true, true);""",
            kind,
        )
        time.sleep(0.8)

    def command(self, name):
        """Run one of the frontend's commands, such as Comfy.QueuePrompt."""
        self.later("await window.app.extensionManager.command.execute(args[0])", name)

    def box(self, kind):
        """The chart or card of the first node of a kind, as an element."""
        return self.js(
            """const node = window.app.graph.nodes.find((n) => n.type === arguments[0]);
            return node.widgets.find((w) => w.type === "sara_chart").element;""",
            kind,
        )

    def text(self, kind):
        """Text of the chart or card of the first node of a kind."""
        return self.js("return arguments[0].innerText", self.box(kind))

    def inked(self, kind):
        """Share of a chart's pixels that are painted."""
        return self.js(
            """const canvas = arguments[0].querySelector("canvas");
            const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
            let painted = 0;
            for (let i = 3; i < data.length; i += 4) painted += data[i] > 0;
            return painted / (canvas.width * canvas.height);""",
            self.box(kind),
        )

    def colours(self, kind):
        """The most frequent colours in a screenshot of a chart; proves that people see it."""
        import io

        from PIL import Image

        image = Image.open(io.BytesIO(self.box(kind).screenshot_as_png)).convert("RGB")
        return sorted(image.getcolors(1 << 20), reverse=True)

    def errors(self):
        """Console errors and warnings of this pack's scripts since the last call."""
        entries = self.driver.get_log("browser")
        ours = [e for e in entries if "/extensions/" in e["message"] or "SaRA" in e["message"]]
        return [
            e["message"] for e in ours if e["level"] != "INFO" and "favicon" not in e["message"]
        ]
