"""A handful of the kills that `python dev.py faults` makes by the dozen."""

import importlib.util
from pathlib import Path

import pytest

pytest.importorskip("comfy.sd", reason="set COMFYUI_PATH")


@pytest.mark.slow
def test_killed_trainings_lose_nothing_that_was_saved(dev, tmp_path):
    path = Path(__file__).resolve().parents[1] / "faults.py"
    spec = importlib.util.spec_from_file_location("sara_faults", path)
    faults = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(faults)
    tried, survived, most_lost = faults.run_faults(dev, tmp_path, kills=3, seed=1)
    assert tried == survived == 3
    assert most_lost <= 2 * faults.SAVE_EVERY + 1  # one save under way, one waiting
