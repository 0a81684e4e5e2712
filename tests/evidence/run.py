"""Do the runs of the plan that are not done yet, each in a process of its own, at low priority.

Run by `python dev.py evidence [QUESTION ...] [--part 0/2] [--quick] [--folder FOLDER]`. A run leaves one JSON
file in the folder, by default in the cache; one that was interrupted begins anew, and one whose figures are in
docs/evidence.json is not done again, unless `--anew` says so or pictures are wanted of it. The report, of what is done
so far, is written beside them, or where `--out` says.
"""

import argparse
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

from ..emoji64 import pictures as emoji
from ..harness.environment import CACHE
from .plan import QUESTIONS, REFERENCE, REFERENCES, key, kind, plan_of, quick
from .report import write

ROOT = Path(__file__).resolve().parents[2]
KNOWN = ROOT / "docs" / "evidence.json"


def do(plan, pictures, folder):
    """Do one run, unless it is done; one that fails does not keep the others from being done."""
    out = folder / f"{key(plan)}.json"
    if not out.is_file():
        command = [sys.executable, "-m", "tests.evidence.one", pictures, out, json.dumps(plan)]
        done = subprocess.run(list(map(str, command)), cwd=ROOT, preexec_fn=lambda: os.nice(19))
        print(f"{out.name}{': failed' if done.returncode else ''}", flush=True)


def recall(folder, with_pictures):
    """Put the runs of docs/evidence.json into the folder; those that made pictures only if asked."""
    for run in json.loads(KNOWN.read_text()):
        plan = plan_of(run)
        file = folder / f"{key(plan)}.json"
        if not file.is_file() and (with_pictures or not plan.get("likeness")):
            file.write_text(json.dumps(run, indent=1))


def enough(plans, runs, reference):
    """Return the plans of a question that are done, as far as methods can be compared by them.

    A method counts with the seeds in which all its rates are done, or two of them; a seed counts in which the base
    and what others are compared with are done.
    """
    planned = Counter((plan["name"], plan["seed"]) for plan in plans)
    done = [plan for plan in plans if key(plan) in runs]
    found = Counter((plan["name"], plan["seed"]) for plan in done)
    counts = {which for which, number in found.items() if number >= min(2, planned[which])}
    if kind(plans[0]) == "curves":
        seeds = {seed for name, seed in counts if {("base", seed), (reference, seed)} <= counts}
        counts = {(name, seed) for name, seed in counts if seed in seeds}
    return [plan for plan in done if (plan["name"], plan["seed"]) in counts]


def main():
    """Do them in their order."""
    parser = argparse.ArgumentParser()
    titles = "; ".join(f"{number}: {title}" for number, title in enumerate(QUESTIONS, 1))
    parser.add_argument(
        "questions", nargs="*", type=int, help=f"numbers of questions, all by default. {titles}"
    )
    parser.add_argument("--folder", type=Path, default=CACHE / "evidence")
    parser.add_argument("--out", type=Path, help="folder of the report")
    parser.add_argument("--anew", action="store_true", help="also what docs/evidence.json holds")
    parser.add_argument("--report", action="store_true", help="only that, of what is done")
    parser.add_argument("--part", default="0/1", help="every n-th run, from this one on")
    parser.add_argument(
        "--quick", action="store_true", help="a few steps of some: the machinery only"
    )
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    if not (options.anew or options.quick):
        recall(options.folder, with_pictures=options.report)
    drawn = CACHE / "evidence-pictures" / f"emoji64-{emoji.VERSION}.npz"
    if not drawn.is_file():
        drawn.parent.mkdir(exist_ok=True)
        emoji.main(drawn)
    asked = {
        title: plans()
        for number, (title, plans) in enumerate(QUESTIONS.items(), 1)
        if number in options.questions or not options.questions
    }
    if options.quick:
        asked = quick(asked)
    every = {key(plan): plan for plans in asked.values() for plan in plans}
    first, step = map(int, options.part.split("/"))
    for plan in [] if options.report else list(every.values())[first::step]:
        do(plan, drawn, options.folder)
    files = {name: options.folder / f"{name}.json" for name in every}
    runs = {name: json.loads(file.read_text()) for name, file in files.items() if file.is_file()}
    if len(runs) < len(files) and step > 1:
        return  # another part will write the report
    for title, plans in asked.items():
        if count := sum(key(plan) not in runs for plan in plans):
            print(f"{title}: {count} of {len(plans)} runs missing")
    left = {title: sum(key(p) not in runs for p in plans) for title, plans in asked.items()}
    asked = {t: enough(p, runs, REFERENCES.get(t, REFERENCE)) for t, p in asked.items()}
    asked = {title: plans for title, plans in asked.items() if plans}
    out = options.out or options.folder
    rows = {
        title: [options.folder / f"{key(plan)}.png" for plan in plans]
        for title, plans in asked.items()
        if plans[0].get("likeness")
    }
    questions = {title: [runs[key(plan)] for plan in plans] for title, plans in asked.items()}
    write(questions, list(runs.values()), out, rows, left)
    print(f"written: {out / 'evidence.md'}")
    if len(runs) < len(files):
        sys.exit(1)


if __name__ == "__main__":
    main()
