#!/usr/bin/env python3
"""Set up, test and demonstrate ComfyUI-SaRA. Needs nothing but Python's standard library.

usage: python dev.py COMMAND

  test [ARGS]   run the test suite in a real ComfyUI; ARGS go to pytest
  lint          check style, formatting and types
  demo [FOLDER] fine-tune a small model on CPU inside ComfyUI, leave pictures in output/demo/
  faults        break trainings in every way, kills above all, and go on (--kills 50 --rounds 3)
  bench         measure memory and time beside other methods (--quick, --executor, --processes)
  evidence      measure what each method learns and forgets: hours (--quick); needs npm
  screenshots   take the pictures of the help pages and example workflows anew; needs chromium
  examples      write the example workflows anew from tests/examples
  server        start the same ComfyUI with the pack and the small model, to click through
  setup         only do the set-up of the above

All set-up goes to a cache folder (SARA_CACHE, by default ~/.cache/comfyui-sara): a virtual
environment, a ComfyUI (unless COMFYUI_PATH points to one) and the small model's checkpoint.
"""

import contextlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tests import demo
from tests.harness.environment import (
    CACHE,
    ROOT,
    install_measures,
    install_peers,
    python,
    say,
    set_up,
)
from tests.harness.server import Server, make_base


def run_module(module, *arguments, **environment):
    """Run a module of the repository in the virtual environment; returns its exit status."""
    environment = (
        os.environ | {"COMFYUI_PATH": str(set_up()), "SARA_CACHE": str(CACHE)} | environment
    )
    command = [python(), "-u", "-m", module, *arguments]
    return subprocess.run(list(map(str, command)), cwd=ROOT, env=environment).returncode


def test(arguments):
    """Run the test suite."""
    return run_module("pytest", "-p", "no:cacheprovider", *arguments)


def lint(arguments):
    """Check style, formatting and the core's types."""
    return (
        run_module("ruff", "check", ".", *arguments)
        or run_module("ruff", "format", "--check", ".")
        or run_module("mypy", "sara_core")
    )


def faults(arguments):
    """Break trainings."""
    return run_module("tests.faults", *arguments)


def bench(arguments):
    """Measure."""
    set_up()
    kinds = ("--executor", "--processes")
    module = next((kind.strip("-") for kind in kinds if kind in arguments), "run")
    arguments = [argument for argument in arguments if argument not in kinds]
    return run_module(f"tests.benchmark.{module}", *arguments, PYTHONPATH=str(install_peers()))


def evidence(arguments):
    """Measure what methods are worth."""
    set_up()
    path = install_peers(), install_measures()
    return run_module("tests.evidence.run", *arguments, PYTHONPATH=os.pathsep.join(map(str, path)))


def screenshots(arguments):
    """Take pictures of nodes and workflows."""
    return run_module("tests.screenshots", *arguments)


def examples(arguments):
    """Write the example workflows anew."""
    return run_module("tests.examples.write", *arguments)


def serve():
    """Start ComfyUI with the pack for a person to click through."""
    set_up()
    with tempfile.TemporaryDirectory() as scratch:
        make_base(Path(scratch))
        with Server(scratch) as server, contextlib.suppress(KeyboardInterrupt):
            say(
                f"Open http://127.0.0.1:{server.port} and take a workflow from the templates; "
                "Ctrl-C ends it"
            )
            server.process.wait()


def show(arguments):
    """Make the demo's pictures."""
    (out,) = arguments or [ROOT / "output" / "demo"]
    set_up()
    demo.run(Path(out))


def main():
    """Run the command that was asked for."""
    command, *arguments = sys.argv[1:] or [""]
    with_arguments = {
        "test": test, "lint": lint, "demo": show, "faults": faults, "bench": bench,
        "evidence": evidence, "screenshots": screenshots, "examples": examples,
    }  # fmt: skip
    plain = {"server": serve, "setup": set_up}
    if not command:
        print(__doc__.strip())
    elif command in with_arguments:
        sys.exit(with_arguments[command](arguments))
    elif command in plain and not arguments:
        plain[command]()
    else:
        sys.exit(f"no such command: {' '.join(sys.argv[1:])}\n\n{__doc__.strip()}")


if __name__ == "__main__":
    main()
