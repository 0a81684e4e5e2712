"""The commands of dev.py that the README tells people to run, as processes of their own, to their end."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import urllib.request

import numpy as np
import pytest
from PIL import Image

from sara_core import SparseDelta

from ..harness.environment import ROOT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif("COMFYUI_PATH" not in os.environ, reason="set COMFYUI_PATH"),
]


def command(*arguments):
    return [sys.executable, str(ROOT / "dev.py"), *map(str, arguments)]


def run(*arguments):
    """What a command prints; it must succeed."""
    done = subprocess.run(command(*arguments), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(float)


def test_without_a_command_it_says_what_there_is():
    assert "usage: python dev.py COMMAND" in run()
    wrong = subprocess.run(command("tset"), cwd=ROOT, capture_output=True, text=True)
    assert wrong.returncode == 1
    assert "no such command: tset" in wrong.stderr


def test_the_demo_leaves_what_it_promises(tmp_path):
    printed = run("demo", tmp_path)
    named = set(re.findall(r"[\w-]+\.(?:png|txt|safetensors)", printed))
    assert named == {path.name for path in tmp_path.iterdir()}
    before, after = pixels(tmp_path / "before.png"), pixels(tmp_path / "after.png")
    assert before.shape == after.shape
    assert 5 < np.abs(before - after).mean() < 100  # other pictures, of the same things
    for name in ("before.png", "after.png", "loss.png", "weights.png"):
        assert pixels(tmp_path / name).std() > 10  # not blank
    assert "selects" in (tmp_path / "report.txt").read_text(encoding="utf-8")
    delta = SparseDelta.load(tmp_path / "fluent3d.safetensors")
    assert delta.metadata["sara.steps"] == "300"
    assert max(float(entry.values.abs().max()) for entry in delta.entries.values()) > 1e-4


def test_the_server_answers_and_ends_on_ctrl_c():
    process = subprocess.Popen(
        command("server"), cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored in the background
    )  # fmt: skip
    try:
        address = next(
            found[1] for line in process.stdout if (found := re.search(r"Open (http://\S+)", line))
        )
        with urllib.request.urlopen(f"{address}/object_info/SaraTrain", timeout=60) as answer:
            assert "SaraTrain" in json.load(answer)
        with urllib.request.urlopen(f"{address}/internal/logs", timeout=60) as answer:
            log = json.load(answer)
        assert "ComfyUI-SaRA" in log
        assert "IMPORT FAILED" not in log
    finally:
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        assert process.wait(60) == 0


def test_trainings_survive_kills_and_every_other_fault():
    printed = run("faults", "--kills", 3, "--rounds", 1)
    tried, survived, lost = map(
        int, re.search(r"tried (\d+), survived (\d+), .* (\d+)", printed).groups()
    )
    assert tried == survived > 3 + 10
    assert lost < 16


def test_the_benchmark_measures_each_method(tmp_path):
    rows = "floor-frozen,sara,adamw-full,peft-lora"
    out = tmp_path / "benchmark"
    run("bench", "--quick", "--steps", 1, "--warm-up", 1, "--only", rows, "--out", out)
    rows = json.loads((tmp_path / "benchmark.json").read_text())["rows"]
    methods = {row["method"] for row in rows}
    assert {"sara", "adamw-full", "peft-lora", "floor-frozen"} <= methods
    assert all(row["peak_bytes"] > 0 and row["step_seconds"] > 0 for row in rows)


def test_the_benchmark_counts_what_processes_send():
    printed = run("bench", "--processes")
    assert "holds: processes send at most 4.1 bytes" in printed
    assert "holds: a tenth of the dense gradients" in printed
    assert "DOES NOT HOLD" not in printed


@pytest.mark.skipif(shutil.which("npm") is None, reason="the pictures come with npm")
def test_the_study_runs_each_method_and_writes_its_report(tmp_path):
    printed = run("evidence", "--quick", "--folder", tmp_path / "runs", "--out", tmp_path)
    assert f"written: {tmp_path / 'evidence.md'}" in printed
    runs = json.loads((tmp_path / "evidence.json").read_text())
    methods = {"none", "sara", "masked", "full", "lora", "shira", "low rank on mask",
               "low-rank change", "reselecting", "zero", "by gradient"}  # fmt: skip
    assert {run["method"] for run in runs} == methods
    curves = [run["losses"] for run in runs if "losses" in run]
    (base,) = (losses["0"] for losses in curves if "0" in losses)
    (merged,) = (run["mixes"] for run in runs if "together" in run.get("mixes", ()))
    assert merged["3d alone"]["losses"]["3d"] < base["new"]
    (zeroed,) = (run["zeroed"] for run in runs if "zeroed" in run)
    assert zeroed["0.5"]["noto"] > zeroed["0.0"]["noto"]
    for found in (losses["1.0"] for losses in curves if "1.0" in losses):
        assert found["new"] < base["new"]  # three steps teach a little
        assert found["drift"] > 0
    assert pixels(tmp_path / "images" / "evidence_the_machinery.png").std() > 5
    assert "| SaRA 10 % |" in (tmp_path / "evidence.md").read_text()
    again = run("evidence", "--quick", "--folder", tmp_path / "runs", "--out", tmp_path)
    assert again.count("emoji64-") == 0  # all were done
