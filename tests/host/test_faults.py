"""A handful of the kills that `python dev.py faults` makes by the dozen, and every other fault once."""

import pytest

from .. import faults

pytest.importorskip("comfy.sd", reason="set COMFYUI_PATH")


@pytest.mark.slow
def test_killed_trainings_lose_nothing_that_was_saved(dev, tmp_path):
    tried, survived, most_lost = faults.run_kills(dev, tmp_path, kills=3, seed=1)
    assert tried == survived == 3
    assert most_lost <= 2 * faults.SAVE_EVERY + 1  # one save under way, one waiting


@pytest.mark.slow
def test_every_other_fault_is_survived_in_a_living_server(dev, tmp_path):
    from .. import injected

    tried, survived, most_lost = injected.run_injected(dev, tmp_path, seed=1)
    assert tried == survived == len(injected.KINDS)
    assert most_lost < faults.STEPS
