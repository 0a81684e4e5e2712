"""Let everything go wrong that can during a training in ComfyUI, and see what is left.

Run by `python dev.py faults --kills N`. First N times SIGKILL to the server, at random moments of
training and saving; then the faults of `injected.py`. After each, every file in the run's folder
must load, damaged copies of its state must be refused, and the run must be taken up again; a run that
ends must have learned the same bits as one that was never stopped.
"""

import argparse
import csv
import os
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))

import torch  # noqa: E402

from sara_core import SparseDelta  # noqa: E402
from sara_core.files.state_file import read_state  # noqa: E402

from .harness.server import Server, make_base  # noqa: E402
from .harness.workflows import TRAIN, load_workflow, node_titled  # noqa: E402

STEPS, SAVE_EVERY = 16, 1
LOOK_EVERY = 0.25  # seconds between two looks whether a run has ended


def training_prompt(server, name, resume):
    prompt = load_workflow(server, TRAIN)
    train = node_titled(prompt, "SaRA Train")
    prompt[train]["inputs"].update(
        steps=STEPS, save_every_steps=SAVE_EVERY, keep_checkpoints=2, output_name=name,
        resume=resume, save_dtype="fp32", seed=4, keep_state=False,
    )  # fmt: skip
    prompt[node_titled(prompt, "SaRA Image Folder")]["inputs"]["folder"] = "input/few"
    needed, todo = {}, [train]
    while todo:
        key = todo.pop()
        needed[key] = prompt[key]
        todo += [v[0] for v in prompt[key]["inputs"].values() if isinstance(v, list)]
    return needed


def run_to_the_end(server, name, resume="new run"):
    server.run(training_prompt(server, name, resume))


def kill_during(server, name, resume, moment):
    """Start or resume a run and kill the server `moment` seconds after its first step, or once it has ended.

    Returns whether it was killed before the run had ended, and how many seconds after its first step.
    """
    events = server.events()
    server.submit(training_prompt(server, name, resume))
    for event in events:
        if event["type"] == "progress" and event["data"]["max"] == STEPS:
            break
        if event["type"] == "execution_success":  # all its steps had been made before the last kill
            break
        if event["type"] == "execution_error":
            raise AssertionError(event["data"]["exception_message"])
    started, finished = time.time(), False
    while not finished and (left := started + moment - time.time()) > 0:
        time.sleep(min(left, LOOK_EVERY))
        finished = not server.get("/prompt")["exec_info"]["queue_remaining"]
    elapsed = time.time() - started
    server.process.kill()
    server.process.wait()
    return not finished, elapsed


def check_files(folder, up_to=None):
    """Load every file a user would find. Returns the number of steps that were lost.

    Steps after `up_to` do not count, as when nothing could be written any more.
    """
    done = 0
    if (folder / "loss.csv").is_file():
        with open(folder / "loss.csv", newline="") as file:
            done = max(
                (int(r[0]) for r in csv.reader(file) if len(r) == 6 and r[0].isdigit()), default=0
            )
    kept = 0
    for path in folder.glob("*.safetensors"):
        if path.name == "state.safetensors":
            kept = read_state(path)["run"]["step"]
            refuse_damaged(path)
        else:
            SparseDelta.load(path)
    finished = any(
        not p.name.startswith(("state", "checkpoint")) for p in folder.glob("*.safetensors")
    )
    return 0 if finished else max(0, min(done, done if up_to is None else up_to) - kept)


def refuse_damaged(path):
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[random.randrange(len(whole))] ^= 1 << random.randrange(8)
    for damaged in (whole[: random.randrange(len(whole))], bytes(flipped)):
        copy = path.with_name("damaged")
        copy.write_bytes(damaged)
        try:
            read_state(copy)
        except ValueError:
            continue
        finally:
            copy.unlink()
        raise AssertionError(f"a damaged copy of {path} was accepted")


def assert_same_delta(one, two, atol=0.0, rtol=0.0):
    one, two = SparseDelta.load(one), SparseDelta.load(two)
    assert one.entries.keys() == two.entries.keys()
    for name, entry in one.entries.items():
        other = two.entries[name].values
        assert torch.allclose(entry.values, other, atol=atol, rtol=rtol), (
            f"{name} differs by {(entry.values - other).abs().max():.2g}"
        )


def lay_out(base):
    """Lay out a ComfyUI base folder with sixteen pictures to train on."""
    make_base(base)
    (base / "input" / "few").mkdir()
    for file in sorted((base / "input" / "fluent3d").iterdir())[:16]:
        shutil.copy(file, base / "input" / "few")


def run_kills(base, kills, seed=0, say=print):
    """Try `kills` kills. Returns how many were tried, survived, and the most steps lost."""
    lay_out(base)
    output = base / "output" / "sara"
    with Server(base) as server:
        started = time.time()
        run_to_the_end(server, "straight")
        longest = time.time() - started
    straight = output / "straight_00001" / f"straight_{STEPS}_steps.safetensors"

    dice = random.Random(seed)
    tried = survived = most_lost = number = finished = 0
    resume = "new run"
    while tried < kills:
        if resume == "new run":
            number += 1
            folder = output / f"killed{number}_00001"
        with Server(base) as server:
            moment = dice.uniform(0, longest)
            killed, elapsed = kill_during(server, f"killed{number}", resume, moment)
        if not killed:  # the machine was busier when the first run was timed
            longest = min(longest, elapsed)
        if killed:
            tried += 1
            try:
                lost = check_files(folder)
            except (AssertionError, ValueError, OSError) as error:
                say(f"kill {tried} of {kills} after {moment:.1f} s: DAMAGED, {error}")
                resume = "new run"
                continue
            most_lost = max(most_lost, lost)
            survived += 1
            say(f"kill {tried} of {kills} after {moment:.1f} s: {lost} steps lost")
        has_state = (folder / "state.safetensors").is_file()
        resume = folder.name if has_state else "new run"
        final = folder / f"killed{number}_{STEPS}_steps.safetensors"
        if final.is_file():
            finished += 1
            assert_same_delta(straight, final)
    if resume != "new run":
        with Server(base) as server:
            run_to_the_end(server, "ignored", resume)
        finished += 1
        assert_same_delta(straight, folder / f"killed{number}_{STEPS}_steps.safetensors")
    say(
        f"{finished} runs came to their end, most of them resumed, with the bits of one that nothing "
        "happened to"
    )
    return tried, survived, most_lost


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=3, help="of every other fault")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    from .injected import run_injected

    results = []
    for run, count in ((run_kills, options.kills), (run_injected, options.rounds)):
        with tempfile.TemporaryDirectory() as scratch:
            results.append(run(Path(scratch), count, options.seed))
    (kills, whole, lost), (injected, mended, lost_too) = results
    tried, survived = kills + injected, whole + mended
    sys.stdout.write(
        f"faults tried {tried}, survived {survived}, most steps lost {max(lost, lost_too)}\n"
    )
    sys.exit(survived < tried)


if __name__ == "__main__":
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    main()
