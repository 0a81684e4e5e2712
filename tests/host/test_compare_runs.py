"""Curves of several runs in one picture."""

import csv

import numpy as np
import pytest
from PIL import Image

from ..harness.server import PromptError
from .graphs import Graph, dataset, emoji64


def write_run(folder, losses, validation=(), **settings):
    from sara_core.training.run_folder import RunFolder
    from sara_core.training.run_settings import RunSettings
    from sara_core.training.task import StepReport

    run = RunFolder.create(folder, "run", RunSettings(**settings))
    for step, loss in enumerate(losses, 1):
        run.add_loss(StepReport(step, loss, 1e-4, 1))
    for step, loss in validation:
        run.add_validation(step, loss)
    run.close()
    return run.path


def history(path):
    from sara_core.training.run_history import read_history

    return read_history(path, path.name)


def test_curves_lie_where_the_losses_say(tmp_path, sara):
    from sara_pack.nodes.training.run_curves import COLOURS, TOP, draw_runs

    paths = [
        write_run(tmp_path, [1.0] * 50, [(50, 0.5)], steps=100),
        write_run(tmp_path, [0.0] * 100, steps=100),
    ]
    picture = (draw_runs([history(path) for path in paths], 0.0)[0].numpy() * 255).round()

    def where(colour):
        wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
        rows, columns = np.nonzero((picture[:500] == wanted).all(-1))
        return rows, columns

    rows, columns = where(COLOURS[0])
    line = rows < TOP + 5
    assert columns[line].max() == pytest.approx((70 + 980) / 2, abs=3)  # half of the other's steps
    assert rows[~line].mean() == pytest.approx((TOP + 480) / 2, abs=3)  # the dot, half way down
    rows, columns = where(COLOURS[1])
    assert abs(rows - 480).max() <= 2
    assert columns.max() == pytest.approx(980, abs=3)


def test_smoothing_is_an_exponential_mean_without_a_pull_at_first(sara):
    from sara_pack.nodes.training.run_curves import smoothed

    points = [(1, 4.0), (2, float("nan")), (3, 1.0)]
    assert smoothed(points, 0.0) == [(1, 4.0), (3, 1.0)]
    found = smoothed(points, 0.5)
    assert found == [(1, pytest.approx(4.0)), (3, pytest.approx((0.5 * 4 + 1) / 1.5))]


def test_the_report_names_what_differs_and_steps_that_were_retried_count_once(tmp_path, sara):
    from sara_pack.nodes.training.run_curves import report

    one = write_run(tmp_path, [1.0, 0.5], [(2, 0.4), (1, 0.3)], steps=2, fraction=0.1, seed=3)
    two = write_run(tmp_path, [1.0], steps=5, fraction=0.2, seed=3)
    with open(two / "loss.csv", "a", newline="") as file:
        csv.writer(file).writerows([(1, "2.0", "0.1", 1, 0, ""), (2, "")])
    text = report([history(one), history(two)], 0.0)
    assert "run_00001: 2 of 2 steps, loss 0.5000, lowest validation 0.3000 after 1" in text
    assert "run_00002: 1 of 5 steps, loss 2.0000" in text
    assert "  fraction: run_00001: 0.1, run_00002: 0.2" in text
    assert "seed" not in text


def test_runs_are_compared_through_the_server(server):
    graph = Graph(server)
    checkpoint, model, _ = emoji64(graph)
    data = dataset(graph, checkpoint)
    for seed in (0, 1):
        graph(
            "SaraTrain", model=model, latents=data, positive=data.out(1), steps=3, batch_size=1,
            output_name="compared", seed=seed,
        )  # fmt: skip
    graph.run()
    again = Graph(server)
    node = again("SaraCompareRuns", run="compared_00001", others="compared_*", smoothing=0.5)
    outputs = again.run()[node]
    (text,) = outputs["text"]
    assert "compared_00002: 3 of 3 steps" in text
    seeds = "seed: compared_00001: {}, compared_00002: {}"  # in whichever order they have run
    assert seeds.format(0, 1) in text or seeds.format(1, 0) in text
    (shown,) = outputs["images"]
    with Image.open(server.base / "temp" / shown["subfolder"] / shown["filename"]) as picture:
        assert picture.size == (1000, 520 + 2 * 24 + 8)
    wrong = Graph(server)
    wrong("SaraCompareRuns", run="compared_00001", others="nothing", smoothing=0.5)
    with pytest.raises(PromptError, match="there is no run 'nothing' in output/sara"):
        wrong.run()


def test_a_run_without_a_step_is_refused(tmp_path, sara):
    path = write_run(tmp_path, [1.0], steps=2)
    (path / "loss.csv").unlink()
    with pytest.raises(ValueError, match="has made no step yet"):
        history(path)


@pytest.mark.parametrize(("threshold", "names"), [(0.0, ["select_from"]), (0.1, [])])
def test_what_a_run_does_not_go_by_is_no_difference(tmp_path, sara, threshold, names):
    from sara_core.training.run_history import differing

    ways = ("model", "each layer")
    runs = [write_run(tmp_path, [1.0], select_from=way, threshold=threshold) for way in ways]
    assert differing([history(run) for run in runs]) == names
