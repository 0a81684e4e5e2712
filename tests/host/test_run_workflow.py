"""A workflow in several processes, started by torchrun: what one process makes of it, and how it ends."""

import csv
import importlib.util
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from sara_core import SparseDelta

from ..harness.environment import comfyui
from .graphs import Graph, saved_latents

ROOT = Path(__file__).resolve().parents[2]
STEPS = 12
LIMIT = 300  # seconds that anything may take
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_available(), reason="torch without torch.distributed"),
]


def workflow(server, name, batch, **options):
    """Encode a folder, train with previews and pictures held out, sample with what was learned."""
    graph = Graph(server)
    checkpoint = graph("CheckpointLoaderSimple", ckpt_name="emoji64.safetensors")
    folder = graph(
        "SaraImageFolder",
        vae=checkpoint.out(2),
        clip=checkpoint.out(1),
        folder="input/fluent3d",
        size=64,
    )
    latent = graph("EmptySD3LatentImage", width=64, height=64, batch_size=1)
    preview = graph(
        "SaraSampling", vae=checkpoint.out(2), positive=folder.out(3), negative=folder.out(3),
        latent=latent, steps=2,
    )  # fmt: skip
    widgets = {
        "steps": STEPS, "batch_size": batch, "learning_rate": 1e-3, "save_every_steps": 2,
        "validation_split": 0.1, "validate_every_steps": 6, "preview_every_steps": 6,
        "save_dtype": "fp32", "output_name": name,
    }  # fmt: skip
    trained = graph(
        "SaraTrain", model=checkpoint, latents=folder, positive=folder.out(1), empty=folder.out(3),
        preview=preview, **widgets | options,
    )  # fmt: skip
    made = graph(
        "KSampler", model=trained, positive=folder.out(3), negative=folder.out(3), latent_image=latent,
        seed=1, steps=2, cfg=1.0, sampler_name="euler", scheduler="simple", denoise=1.0,
    )  # fmt: skip
    graph("SaveLatent", samples=made, filename_prefix=f"latents/{name}")
    return graph


class Started:
    """A workflow in processes of its own, and what they have said so far."""

    def __init__(self, server, graph, count, restarts=0, **environment):
        self.file = server.base / f"workflow_{time.monotonic_ns()}.json"
        self.file.write_text(json.dumps(graph.prompt))
        self.log = self.file.with_suffix(".log")
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", count]
        command = [
            sys.executable, *(torchrun if count else []),
            *(["--max-restarts", restarts] if restarts else []),
            server.base / "custom_nodes/ComfyUI-SaRA/nodes/host/run_workflow.py", self.file,
            "--comfyui", comfyui(), "--base-directory", server.base, "--cpu",
            "--use-pytorch-cross-attention", "--disable-api-nodes",
        ]  # fmt: skip
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                list(map(str, command)), stdout=log, stderr=subprocess.STDOUT,
                env=os.environ | environment,
            )  # fmt: skip

    @property
    def said(self):
        return self.log.read_text(errors="replace")

    def wait_for(self, text, times=1):
        started = time.monotonic()
        while len(re.findall(text, self.said)) < times:
            assert self.process.poll() is None, self.said[-3000:]
            assert time.monotonic() < started + LIMIT, self.said[-3000:]
            time.sleep(0.1)

    def end(self):
        try:
            return self.process.wait(LIMIT)
        finally:
            for number in self.workers():
                os.kill(number, signal.SIGKILL)
            self.process.kill()

    def workers(self):
        found = subprocess.run(
            ["pgrep", "-f", f"run_workflow.py {self.file}"], capture_output=True, text=True
        )
        return [int(number) for number in found.stdout.split() if int(number) != self.process.pid]


def run_folder(server, name):
    """The newest: one that was killed before its first save left another."""
    return max((server.base / "output" / "sara").glob(f"{name}_*"))


def learned(server, name):
    delta = SparseDelta.load(run_folder(server, name) / f"{name}_{STEPS}_steps.safetensors")
    return {key: (entry.index, entry.values) for key, entry in delta.entries.items()}


def table(folder, name):
    with open(folder / name, newline="") as file:
        return [[float(cell or "nan") for cell in row] for row in list(csv.reader(file))[1:]]


def assert_close(found, expected):
    largest = max(values.abs().max() for _, values in expected.values())
    assert largest > 1e-3
    for name, (index, values) in expected.items():
        assert torch.equal(found[name][0], index)
        torch.testing.assert_close(found[name][1], values, rtol=0, atol=float(largest) / 50)


@pytest.fixture(scope="module")
def alone(server):
    """The workflow in the server, with batches of four."""
    workflow(server, "alone", 4).run()
    return server


def test_two_processes_learn_what_the_server_does_with_the_whole_batch(alone):
    shutil.rmtree(alone.base / "user" / "sara_cache")  # so that both encode
    started = Started(alone, workflow(alone, "pair", 2), 2)
    assert started.end() == 0, started.said[-3000:]
    assert_close(learned(alone, "pair"), learned(alone, "alone"))
    one, two = run_folder(alone, "alone"), run_folder(alone, "pair")
    for name in ("loss.csv", "validation.csv"):
        torch.testing.assert_close(
            torch.tensor(table(two, name)),
            torch.tensor(table(one, name)),
            rtol=2e-3,
            atol=1e-4,
            equal_nan=True,
        )
    kept = {path.relative_to(two).as_posix() for path in two.rglob("*.png")}
    assert kept == {path.relative_to(one).as_posix() for path in one.rglob("*.png")} != set()
    assert started.said.count("SaRA Train: step 1 of") == 1
    torch.testing.assert_close(
        saved_latents(alone, "pair"), saved_latents(alone, "alone"), rtol=0, atol=0.02
    )


def test_two_processes_choose_by_gradient_what_the_server_does(server):
    options = {"select_by": "gradient", "preview_every_steps": 0, "validation_split": 0.0}
    workflow(server, "chosen_alone", 4, **options).run()
    started = Started(server, workflow(server, "chosen_pair", 2, **options), 2)
    assert started.end() == 0, started.said[-3000:]
    one, two = learned(server, "chosen_alone"), learned(server, "chosen_pair")
    assert one.keys() == two.keys()
    assert sum(len(index) for index, _ in two.values()) == sum(len(i) for i, _ in one.values())
    same = {name: torch.isin(two[name][0], index).float() for name, (index, _) in one.items()}
    # At the border a part of those that rank alike is taken, which goes by how many there are.
    assert torch.cat(list(same.values())).mean() > 0.95
    assert min(part.mean() for part in same.values() if len(part) > 100) > 0.9
    assert started.said.count("choosing the weights by what they learn: part 1 of") == 1


def test_sigterm_saves_and_the_run_goes_on_in_one_process(alone):
    started = Started(alone, workflow(alone, "ended", 2), 2)
    started.wait_for("step 3 of")
    started.process.send_signal(signal.SIGTERM)
    assert started.end() != 0
    assert "cancelled; all" in started.said
    folder = run_folder(alone, "ended")
    done = len(table(folder, "loss.csv"))
    assert 3 <= done < STEPS
    again = Started(alone, workflow(alone, "ended", 2, resume=folder.name), 0)
    assert again.end() == 0, again.said[-3000:]
    assert f"resumed after step {done}" in again.said
    assert_close(learned(alone, "ended"), learned(alone, "alone"))


def test_killed_processes_are_started_again_and_go_on_from_the_last_save(alone):
    chance = random.Random(7)
    started = Started(alone, workflow(alone, "killed", 2), 2, restarts=3)
    for times in (1, 2):
        started.wait_for("weights, the smallest 10 % of each layer", times)
        time.sleep(chance.uniform(0, 1))
        os.kill(chance.choice(started.workers()), signal.SIGKILL)
    assert started.end() == 0, started.said[-3000:]
    assert_close(learned(alone, "killed"), learned(alone, "alone"))
    assert len(table(run_folder(alone, "killed"), "loss.csv")) == STEPS


def test_an_error_in_one_process_ends_all_with_its_message(alone):
    shutil.copy(ROOT / "tests" / "fault_nodes.py", alone.base / "custom_nodes")
    graph = workflow(alone, "failed", 2)
    graph.prompt["90"] = {"class_type": "TestFault", "inputs": {
        "model": ["1", 0], "kind": "crash", "at": 9, "folder": "", "nonce": ""}}  # fmt: skip
    train = next(node for node in graph.prompt.values() if node["class_type"] == "SaraTrain")
    train["inputs"]["model"] = ["90", 0]
    started = Started(alone, graph, 2, FAULT_RANK="1")
    try:
        assert started.end() != 0
    finally:
        (alone.base / "custom_nodes" / "fault_nodes.py").unlink()
    assert re.search(
        r"SaRA Train: stopped by OtherProcessFailed; all \d+ steps are saved", started.said
    )
    assert "rank 1: RuntimeError: an error from somewhere" in started.said
    assert (run_folder(alone, "failed") / "state.safetensors").is_file()


@pytest.fixture(scope="module")
def script():
    path = ROOT / "nodes" / "host" / "run_workflow.py"
    spec = importlib.util.spec_from_file_location("run_workflow", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read as a workflow"),
        ('{"nodes": [], "links": []}', r"not a workflow in API form.*Export \(API\)"),
        ("{}", "not a workflow in API form"),
    ],
)
def test_what_is_no_workflow_is_refused(script, tmp_path, text, message):
    path = tmp_path / "w.json"
    path.write_text(text)
    with pytest.raises(script.WorkflowError, match=message):
        script.read_workflow(path)


def test_each_process_has_a_card_of_its_own(script, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # so that it is put back
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    script.choose_device(3)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "3"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    script.choose_device(1)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "6"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    with pytest.raises(
        script.WorkflowError, match="is 4,6, so there is no graphics card for process 2"
    ):
        script.choose_device(2)


def test_a_job_that_is_started_again_is_known_by_its_workflow(monkeypatch):
    from sara_pack.nodes import host

    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    assert host.job("3") is None  # a server
    monkeypatch.setenv("SARA_PROCESSES", "1")
    monkeypatch.setenv("SARA_WORKFLOW", "abc")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "run")
    assert host.job("3") == "run abc 3"
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    assert host.job("3") == "77 abc 3"
    assert not host.is_restarted()
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert host.is_restarted()


def test_only_a_run_that_this_job_has_begun_is_gone_on_with(sara, tmp_path, monkeypatch):
    monkeypatch.setattr(sara.host, "output_root", lambda: str(tmp_path))
    settings = sara.settings.RunSettings(steps=4)
    for name in ("one", "two", "three"):
        folder = sara.folder.RunFolder.create(tmp_path, name, settings)
        folder.sign("job a" if name != "three" else "job b")
        if name != "two":
            (folder.path / "state.safetensors").touch()
        folder._lock.close()
    assert sara.output.run_of_job("job a") == "one_00001"  # the other has nothing to go on from
    assert sara.output.run_of_job("job b") == "three_00001"
    assert sara.output.run_of_job("job c") is None


def test_comfyui_is_where_the_pack_is_or_where_it_is_said_to_be(script, tmp_path, monkeypatch):
    (tmp_path / "comfy").mkdir()
    (tmp_path / "main.py").touch()
    assert script.find_comfyui(tmp_path) == tmp_path
    monkeypatch.setattr(
        script, "HERE", tmp_path / "custom_nodes" / "x" / "nodes" / "host" / "run_workflow.py"
    )
    assert script.find_comfyui(None) == tmp_path
    monkeypatch.chdir(tmp_path / "comfy")
    monkeypatch.setattr(script, "HERE", Path("/a/b/c/d/e/f.py"))
    with pytest.raises(script.WorkflowError, match="give its folder with --comfyui"):
        script.find_comfyui(None)


def test_an_encoding_is_made_by_one_that_lacks_it_or_sent_by_the_first_that_has_it():
    from sara_pack.nodes.pictures.division import makers

    assert makers([["a", "b", "c", "d"], ["a", "b", "c"], ["a", "d", "c"]]) == {
        "a": 0, "b": 2, "c": 1, "d": 1,
    }  # fmt: skip
    assert makers([["a", "b"]]) == {"a": 0, "b": 0}
    assert makers([[], ["a"]]) == {"a": 0}
