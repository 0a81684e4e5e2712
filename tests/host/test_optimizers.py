"""Runs with other optimizers, rates by layer and event files, in the real ComfyUI's process."""

import csv
import sys

import pytest
import torch

from .builders import settings
from .test_end_of_a_run import equal, run

PACKAGES = {"prodigy": {"learning_rate": 0.0}, "schedule_free": {"learning_rate": 1e-3}}


@pytest.mark.parametrize("kind", PACKAGES)
def test_a_cancelled_run_goes_on_exactly(sd15, sara, tmp_path, kind, monkeypatch):
    options = settings(sara, steps=8, optimizer=kind, save_every_steps=0, **PACKAGES[kind])
    path, losses, _ = run(sara, sd15, tmp_path / "whole", options)
    make_step = sara.run.TrainingRun._make_step

    def cancelled(training):
        if training.step == 6:
            raise sara.host.Cancelled
        return make_step(training)

    monkeypatch.setattr(sara.run.TrainingRun, "_make_step", cancelled)
    with pytest.raises(sara.host.Cancelled):
        run(sara, sd15, tmp_path / "cut", options)
    monkeypatch.setattr(sara.run.TrainingRun, "_make_step", make_step)
    folder = sara.folder.RunFolder(tmp_path / "cut" / "run_00001")
    resumed = folder.settings.resumed_with(options)
    folder.close()
    again, cut_losses, chart = run(sara, sd15, folder.path, resumed, resume=True)
    assert cut_losses["loss"] == losses["loss"]
    equal(sara.core.SparseDelta.load(path), sara.core.SparseDelta.load(again))
    assert not [line for line in chart["warnings"] if "learning rate" in line]


def test_prodigys_own_rate_is_shown_and_schedule_frees_stays(sd15, sara, tmp_path):
    rates = {}
    for kind, changes in PACKAGES.items():
        options = settings(sara, steps=5, optimizer=kind, lr_schedule="cosine", **changes)
        path, _, _ = run(sara, sd15, tmp_path / kind, options)
        with open(path.parent / "loss.csv", newline="") as file:
            rates[kind] = [float(row["learning_rate"]) for row in csv.DictReader(file)]
    assert rates["schedule_free"] == [1e-3] * 5
    assert rates["prodigy"][0] == pytest.approx(1e-6)
    assert len(set(rates["prodigy"])) > 1


def test_a_small_factor_of_prodigys_rate_is_warned_of(sd15, sara, tmp_path):
    options = settings(sara, steps=1, optimizer="prodigy", learning_rate=1e-4)
    _, _, chart = run(sara, sd15, tmp_path, options)
    assert any("prodigy finds its learning rate by itself" in line for line in chart["warnings"])


def test_layers_train_at_their_own_rates(sd15, sara, tmp_path):
    """Of one AdamW step each weight moves by the rate, whatever its gradient."""
    options = settings(
        sara, steps=1, progressive=0, low_rank_weight=0, learning_rate=1e-3, lr_schedule="constant",
        layer_rates="attn2=0.5, out=0.25", max_grad_norm=0,
    )  # fmt: skip
    path, _, _ = run(sara, sd15, tmp_path, options)
    seen = set()
    for name, entry in sara.core.SparseDelta.load(path).entries.items():
        factor = 0.25 if "out" in name else 0.5 if "attn2" in name else 1.0
        moved = entry.values.abs()
        if moved.max() > 0:
            seen.add(factor)
            torch.testing.assert_close(moved.max(), torch.tensor(1e-3 * factor), rtol=1e-2, atol=0)
    assert seen == {0.25, 0.5, 1.0}


def test_event_files_are_in_the_runs_folder(sd15, sara, tmp_path):
    path, _, _ = run(sara, sd15, tmp_path, settings(sara, steps=2, tensorboard=True))
    assert len(list((path.parent / "tensorboard").glob("events.out.tfevents.*"))) == 1


def test_what_does_not_fit_is_said_before_anything_runs(sara, monkeypatch):
    from sara_pack.nodes.training.train import SaraTrain

    def said(**given):
        return SaraTrain.validate_inputs(["new run"], **{k: [v] for k, v in given.items()})

    assert said(optimizer="prodigy", layer_rates="") is True
    assert "layer_rates is 'attn=2', which is for the optimizer adamw" in said(
        optimizer="prodigy", layer_rates="attn=2"
    )
    assert "expected a pattern of names and a factor" in said(layer_rates="attn")
    monkeypatch.setitem(sys.modules, "schedulefree", None)
    assert "pip install -U schedulefree" in said(optimizer="schedule_free")
    resumed = SaraTrain.validate_inputs(["a run"], optimizer=["schedule_free"])
    assert "there is no run 'a run'" in resumed  # whose own optimizer is what counts
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert "pip install tensorboard" in said(tensorboard=True)


def test_an_estimate_of_memory_knows_what_they_keep(sd15, sara, tmp_path, monkeypatch):
    monkeypatch.setattr(sara.host, "memory_in_use", lambda: (0, 1 << 34))
    trained = {}
    for kind in ("adamw", *PACKAGES):
        _, _, chart = run(sara, sd15, tmp_path / kind, settings(sara, steps=1, optimizer=kind))
        trained[kind] = chart["memory_need"]["trained"]
    count = trained["adamw"] // 17
    assert trained["prodigy"] - trained["adamw"] == 8 * count
    assert trained["schedule_free"] - trained["adamw"] == 4 * count
