"""Faults made to happen inside a living ComfyUI, which has to go on afterwards.

Each is a training of STEPS steps that something happens to. What must hold after each of them is in
`after`: the model is bit for bit what it was, in the same memory, the server answers, every file
loads, and the run goes on to the same bits as `straight`, which nothing happened to.
"""

import json
import os
import random
import re
import shutil
import subprocess
import threading
from pathlib import Path

import torch

from sara_core import SparseDelta

from . import faults
from .harness.server import PromptError, Server
from .harness.workflows import node_titled

CLOSE = {"atol": 2e-5, "rtol": 0.0}  # of a batch in parts, beside updates of 1e-4 and more
PASSES = 3  # before the first step: for changes in place, and two for the memory a step takes
ENDINGS = {  # how each fault must end, and what the user must read
    "cancel": "execution_interrupted",
    "crash": "an error from somewhere",
    "oom always": "CUDA out of memory.*gradient_checkpointing on, lower batch_size",
    "nan always": "not finite in 5 steps in a row.*Lower the learning rate",
    "disk full": "File too large",
    "read-only": "Permission denied",
    "oom forward": None,
    "oom backward": None,
    "nan once": None,
    "disk full for a while": None,
    "read-only for a while": None,
}
KINDS = (*ENDINGS, "read-only from the start", "truncated state", "flipped bit in the state")


def confined():
    """Command prefix that lets folder permissions hold for root too."""
    return ["setpriv", "--bounding-set=-dac_override"] if os.geteuid() == 0 else []


class Suite:
    """A server, the model in it and a run that nothing happened to."""

    def __init__(self, server, seed=0):
        self.server, self.dice = server, random.Random(seed)
        self.output = server.base / "output" / "sara"
        self.number = 0
        self.train("straight")
        self.straight = self.final("straight_00001")
        self.model = self.look()

    def final(self, folder):
        (path,) = (self.output / folder).glob(f"*_{faults.STEPS}_steps.safetensors")
        return path

    def prompt(self, name, kind="none", at=1, resume="new run"):
        prompt = faults.training_prompt(self.server, name, resume)
        train = prompt[node_titled(prompt, "SaRA Train")]["inputs"]
        self.number += 1
        inputs = {"model": train["model"], "kind": kind, "at": at, "folder": str(self.output)}
        prompt["fault"] = {"class_type": "TestFault",
                           "inputs": {**inputs, "nonce": str(self.number)}}  # fmt: skip
        train["model"] = ["fault", 0]
        train["save_every_steps"] = 3
        return prompt

    def train(self, *args, **kwargs):
        self.server.run(self.prompt(*args, **kwargs))

    def failure(self, call, *args, **kwargs):
        """Message that a prompt ends with, or nothing if it succeeds."""
        try:
            call(*args, **kwargs)
        except PromptError as error:
            kind, data = json.loads(str(error))
            return data.get("exception_message", kind)
        return ""

    def look(self):
        """Digest of the checkpoint's weights, hooks and modes, and where it is in memory."""
        prompt = self.prompt("never")
        (checkpoint,) = (k for k, n in prompt.items() if n["class_type"].startswith("Checkpoint"))
        self.number += 1
        look = {"class_type": "TestLookAtModel",
                "inputs": {"model": [checkpoint, 0], "nonce": str(self.number)}}  # fmt: skip
        return self.server.run({checkpoint: prompt[checkpoint], "look": look})["look"]["text"]

    def check_model(self, when):
        found = self.look()
        assert found == self.model, f"the model {when} is {found} instead of {self.model}"

    def cancel(self, name, step):
        """Train, and press Cancel in a random moment of a step."""
        events = self.server.events()
        wait = self.dice.uniform(0, 0.5)

        def press():
            for event in events:
                if event["type"] == "progress" and event["data"]["max"] == faults.STEPS:
                    if event["data"]["value"] >= step:
                        threading.Timer(wait, self.server.post, ("/interrupt", {})).start()
                        return

        threading.Thread(target=press, daemon=True).start()
        self.train(name)

    def run(self, kind):
        """Let one fault happen. Returns the number of steps whose work was lost."""
        name = kind.replace(" ", "_").replace("-", "_")
        number = 1 + len(list(self.output.glob(f"{name}_*")))
        folder = self.output / f"{name}_{number:05}"
        step = self.dice.randint(2, faults.STEPS - 7)
        at = step + PASSES
        before = len(self.server.log_text())
        if kind == "read-only from the start":
            return self.read_only_from_the_start(name, folder)
        if kind.endswith("state"):
            return self.damaged_state(kind, name, folder, at)
        if kind == "cancel":
            ended = self.failure(self.cancel, name, step)
        else:
            ended = self.failure(self.train, name, kind, at)
        self.check_ending(kind, ended, folder, self.server.log_text()[before:])
        return self.after(folder, kind, step)

    def check_ending(self, kind, ended, folder, log):
        expected = ENDINGS[kind]
        if expected is None:
            assert not ended, ended
        else:
            assert re.search(expected, ended, re.DOTALL), f"{kind} ended with {ended!r}"
        if expected and kind not in ("cancel", "disk full", "read-only"):
            assert f"saved in output/sara/{folder.name}. To go on, choose" in ended, ended
        if kind in ("disk full", "read-only"):
            assert f"choose {folder.name} under resume" in ended, ended
        if kind == "cancel":
            assert f"saved in output/sara/{folder.name}. To go on, choose" in log
        if kind.startswith(("disk", "read-only")):
            assert "could not save (" in log
        if kind in ("oom forward", "oom backward"):
            assert "going on with each batch in 2 parts" in log

    def after(self, folder, kind, step):
        self.check_model("after the fault")
        cannot_save = kind in ("disk full", "read-only")
        lost = faults.check_files(folder, up_to=step if cannot_save else None)
        if (folder / "state.safetensors").is_file():
            self.train("ignored", resume=folder.name)
            self.check_model("after the resume")
        final = self.final(folder.name)
        if kind.startswith("nan"):  # steps were left out
            values = [e.values for e in SparseDelta.load(final).entries.values()]
            assert all(torch.isfinite(v).all() for v in values)
            rows = (folder / "loss.csv").read_text().splitlines()
            assert sum(row.split(",")[4] == "1" for row in rows) == (1 if kind == "nan once" else 5)
        else:
            in_parts = kind in ("oom forward", "oom backward")
            faults.assert_same_delta(self.straight, final, **(CLOSE if in_parts else {}))
        return lost

    def read_only_from_the_start(self, name, folder):
        self.output.chmod(0o555)
        try:
            ended = self.failure(self.train, name)
        finally:
            self.output.chmod(0o755)
        assert "Permission denied" in ended, ended
        assert str(self.output) in ended, ended
        self.check_model("after the fault")
        self.train(name)
        faults.assert_same_delta(self.straight, self.final(folder.name))
        return 0

    def damaged_state(self, kind, name, folder, at):
        ended = self.failure(self.train, name, "crash", at)
        assert "an error from somewhere" in ended, ended
        path = folder / "state.safetensors"
        whole = path.read_bytes()
        position = self.dice.randrange(len(whole))
        damaged = bytearray(whole)
        damaged[position] ^= 1 << self.dice.randrange(8)
        damaged = whole[:position] if kind == "truncated state" else bytes(damaged)
        path.write_bytes(damaged)
        ended = self.failure(self.train, "ignored", resume=folder.name)
        assert "cannot be used to resume a run" in ended, f"{position}: {ended[:1000]}"
        assert path.read_bytes() == damaged
        path.write_bytes(whole)
        return self.after(folder, kind, at)


def run_injected(base, rounds=1, seed=0, say=print):
    """Let every kind of fault happen `rounds` times. Returns how many, survived, most steps lost."""
    faults.lay_out(base)
    shutil.copy(Path(__file__).with_name("fault_nodes.py"), base / "custom_nodes")
    subprocess.run([*confined(), "true"], check=True)
    tried = survived = most_lost = 0
    with Server(base, prefix=confined()) as server:
        suite = Suite(server, seed)
        for kind in KINDS * rounds:
            tried += 1
            try:
                lost = suite.run(kind)
            except (AssertionError, ValueError, OSError, PromptError) as error:
                say(f"{kind}: NOT SURVIVED, {str(error)[:1000]}")
                continue
            survived += 1
            most_lost = max(most_lost, lost)
            say(f"{kind}: {lost} steps lost")
    return tried, survived, most_lost
