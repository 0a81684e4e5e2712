"""ComfyUI as a server in a process of its own. Standard library only."""

import contextlib
import json
import shutil
import socket
import struct
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from pathlib import Path

from .environment import ASSETS, ROOT, checkpoint, comfyui, python


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
