"""The numbers that the widgets in the browser draw."""

import json
import logging
import math
import tempfile

import pytest
import torch

from .builders import LOOKS, pairs, settings


def test_the_histogram_holds_every_weight_by_block_and_bin():
    from sara_pack.nodes.analysis import chart
    from sara_pack.sara_core.weights.analysis import analyze

    torch.manual_seed(0)
    weights = {
        "blocks.0.a.weight": torch.randn(300, 200) * 0.02,
        "blocks.0.b.weight": torch.randn(40, 50) * 1e-10,
        "blocks.1.a.weight": torch.cat([torch.zeros(30, 40), torch.randn(30, 40) * 0.5]),
    }
    data = chart.analysis_chart(analyze(weights, fraction=0.1, zeros="skip"), 17)
    assert json.loads(json.dumps(data)) == data
    edges, counts = torch.tensor(data["edges"]), data["counts"]
    assert len(edges) == len(counts) + 1
    assert (edges.diff() > 0).all()
    assert edges[0] <= chart.SMALLEST < edges[1]
    everything = torch.cat([w.flatten().abs() for w in weights.values()])
    live = everything[everything > 0]
    for i in range(1, len(counts)):  # the first bin holds all that is smaller, too
        assert counts[i] == int(((live >= edges[i]) & (live < edges[i + 1])).sum()), i
    assert sum(counts) == len(live)
    assert counts[0] >= 2000
    assert (data["total"], data["zeros"], data["skip_zeros"]) == (64_400, 1200, True)
    assert [block[:3] for block in data["blocks"]] == [
        ["blocks.0", 62_000, 0],
        ["blocks.1", 2400, 1200],
    ]
    for i, count in enumerate(counts):
        assert count == sum(block[3][i] for block in data["blocks"])
    ratio = edges[2:] / edges[1:-1]
    assert float(ratio.max()) <= 1.125 + 1e-6  # an eighth of an octave, linearly


def test_a_curve_keeps_means_over_equal_stretches():
    from sara_pack.nodes.training import curve

    values = [math.sin(i / 50) + i / 1000 for i in range(5000)]
    means = curve.Curve(values)
    points = means.points()
    assert len(points) <= 2 * curve.MAX_POINTS
    stride = points[0][0]
    assert points[-1][0] == means.length == 5000
    for number, mean in points[:-1]:
        stretch = values[number - stride : number]
        assert mean == pytest.approx(sum(stretch) / stride)
    short = curve.Curve([1.0, float("nan"), 3.0, float("inf")])
    assert short.points() == [[1, 1.0], [2, 1.0], [3, 3.0], [4, 3.0]]
    assert curve.Curve([float("nan")]).points() == [[1, 0.0]]


def test_the_browser_is_told_the_whole_state(sd15, sara, monkeypatch):
    from sara_pack.nodes.training import live_chart

    sent = []
    monkeypatch.setattr(sara.host, "send_event", lambda name, data: sent.append((name, data)))
    monkeypatch.setattr(live_chart, "SECONDS_BETWEEN", 0.0)
    latents, captions = pairs(4)
    options = settings(sara, steps=4, progressive=0.5, validation_split=0.3, validate_every_steps=2,
                       save_every_steps=3)  # fmt: skip
    examples = sara.examples.Examples(latents, captions)
    folder = sara.folder.RunFolder.create(tempfile.mkdtemp(), "run", options)
    _, losses, last = sara.run.run(sd15, examples, folder, "7:3")
    assert {name for name, _ in sent} == {"sara.training"}
    assert [data["step"] for _, data in sent] == [0, 1, 2, 3, 4, 4]
    assert json.loads(json.dumps(last)) == last == sent[-1][1]
    assert (last["node"], last["run"], last["status"]) == ("7:3", "run_00001", "finished")
    assert [loss for _, loss in last["losses"]] == losses["loss"]
    assert [step for step, _ in last["validation"]] == losses["validation_step"] == [0, 2, 4]
    kinds = [(step, kind) for step, kind, _ in last["marks"]]
    assert (2, "stage") in kinds
    assert (3, "saved") in kinds
    assert last["seconds_left"] == 0
    assert 0 < last["memory_used"] <= last["memory_total"]


def test_a_stop_and_a_resumed_run_are_shown(sd15, sara, monkeypatch, tmp_path):
    sent = []
    monkeypatch.setattr(sara.host, "send_event", lambda name, data: sent.append(data))
    latents, captions = pairs(4)
    options = settings(sara, steps=5)
    examples = sara.examples.Examples(latents, captions)
    folder = sara.folder.RunFolder.create(tmp_path, "run", options)
    count = [0]

    def fail(*_):
        count[0] += 1
        if count[0] == LOOKS + 3:
            raise KeyError("gone")

    hook = sd15.model.diffusion_model.register_forward_hook(fail)
    with pytest.raises(KeyError):
        sara.run.run(sd15, examples, folder, "3")
    hook.remove()
    assert sent[-1]["status"] == "stopped"
    assert sent[-1]["marks"][-1][:2] == [2, "error"]
    assert "To go on, choose" in sent[-1]["marks"][-1][2]
    sent.clear()
    folder = sara.folder.RunFolder(folder.path)
    _, losses, last = sara.run.run(sd15, examples, folder, "3", True)
    assert sent[0]["step"] == 2
    assert len(sent[0]["losses"]) == 2
    assert [loss for _, loss in last["losses"]] == losses["loss"]
    peak = last["rates"][0][1]  # cosine, without warm-up
    expected = [peak * (1 + math.cos(math.pi * step / 5)) / 2 for step in range(5)]
    assert [rate for _, rate in last["rates"]] == pytest.approx(expected)


def test_a_chart_that_cannot_be_sent_does_not_end_a_training(sd15, sara, monkeypatch, caplog):
    def fail(*_):
        raise OSError("no browser")

    monkeypatch.setattr(sara.host, "send_event", fail)
    latents, captions = pairs(2)
    options = settings(sara, steps=2)
    folder = sara.folder.RunFolder.create(tempfile.mkdtemp(), "run", options)
    with caplog.at_level(logging.WARNING):
        _, losses, _ = sara.run.run(sd15, sara.examples.Examples(latents, captions), folder, "3")
    assert len(losses["loss"]) == 2
    assert caplog.text.count("the chart is not shown: no browser") == 1
