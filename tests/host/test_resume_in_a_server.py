"""Cancel, resume and what pages show of it, through a server."""

import shutil

import pytest
import torch

from sara_core import SparseDelta

from ..harness.server import PromptError
from .graphs import cancel_at, train_graph


def test_a_run_goes_on_with_moments_in_eight_bits_if_asked_to(server):
    """As one has to that ran out of memory; the run's own moments stay where it is not asked for."""
    folder = server.base / "output" / "sara"
    cancel_at(server, 4)
    graph, _ = train_graph(server, "small")
    with pytest.raises(PromptError, match="execution_interrupted"):
        graph.run()
    values = {}
    for name, options in (
        ("again", {}),
        ("eight", {"moments": "8bit"}),
        ("fp32", {"moments": "fp32"}),
    ):
        shutil.copytree(folder / "small_00001", folder / f"{name}_00001")
        server.get("/object_info/SaraTrain")
        graph, train = train_graph(server, "ignored", resume=f"{name}_00001", **options)
        file = graph.run()[train]["text"][0].removeprefix("saved ").split(",")[0]
        entries = SparseDelta.load(folder / file).entries
        values[name] = torch.cat([entry.values for entry in entries.values()])
    assert torch.equal(values["again"], values["fp32"])
    off = (values["eight"] - values["fp32"]).norm() / values["fp32"].norm()
    assert 0 < off.item() < 0.1


def test_a_cancelled_run_is_saved_and_resumed_exactly(server):
    folder = server.base / "output" / "sara"
    graph, _ = train_graph(server, "straight")
    graph.run()
    cancel_at(server, 4)
    graph, _ = train_graph(server, "stopped")
    with pytest.raises(PromptError, match="execution_interrupted"):
        graph.run()
    assert (folder / "stopped_00001" / "state.safetensors").is_file()
    (checkpoint,) = (folder / "stopped_00001").glob("checkpoint*")
    assert SparseDelta.load(checkpoint).num_values > 0
    assert "cancelled; all" in server.log_text()
    options = server.get("/object_info")["SaraTrain"]["input"]["required"]["resume"][1]["options"]
    assert options[:1] == ["new run"]
    assert "stopped_00001" in options
    assert "straight_00001" in options  # it has finished, and can be given more steps

    shutil.copytree(folder / "stopped_00001", folder / "broken_00001")
    state = folder / "broken_00001" / "state.safetensors"
    data = bytearray(state.read_bytes())
    data[-5] ^= 4
    state.write_bytes(data)
    server.get("/object_info/SaraTrain")
    graph, _ = train_graph(server, "ignored", resume="broken_00001")
    with pytest.raises(PromptError, match="do not fit its checksum, the file is damaged"):
        graph.run()
    assert bytes(data) == state.read_bytes()

    graph, train = train_graph(server, "ignored", resume="stopped_00001", steps=3, seed=1)
    text = graph.run()[train]["text"][0]
    assert text.startswith("saved stopped_00001/stopped_14_steps.safetensors")
    one = SparseDelta.load(folder / "straight_00001" / "straight_14_steps.safetensors")
    two = SparseDelta.load(folder / "stopped_00001" / "stopped_14_steps.safetensors")
    for name, entry in one.entries.items():
        assert torch.equal(entry.values, two.entries[name].values), name
    losses = [(folder / n / "loss.csv").read_text() for n in ("straight_00001", "stopped_00001")]
    assert losses[0] == losses[1]
    assert len(losses[0].splitlines()) == 15

    # The run is still chosen, but has left the list: queued once more, it gives what it gave.
    graph, train = train_graph(server, "ignored", resume="stopped_00001", steps=2, seed=2)
    assert graph.run()[train]["text"][0] == text
    assert not list(folder.glob("ignored*"))
    assert (folder / "stopped_00001" / "loss.csv").read_text() == losses[0]
    for name in ("never_00001", "../sara", "", "stopped_00001/previews"):
        graph, _ = train_graph(server, "ignored", resume=name)
        with pytest.raises(PromptError, match="there is no run"):
            graph.run()


def test_what_widgets_showed_is_told_to_a_page_that_is_opened_later(server):
    graph, train = train_graph(server, "shown", steps=2)
    graph.run()
    (state,) = [s for s in server.get("/sara/shown")["sara_training"] if s["run"] == "shown_00001"]
    assert (state["node"], state["step"], state["status"]) == (train, 2, "finished")
    assert [step for step, _ in state["losses"]] == [1, 2]
    cancel_at(server, 1)
    graph, train = train_graph(server, "halted", steps=400)
    with pytest.raises(PromptError, match="execution_interrupted"):
        graph.run()
    shown = server.get("/sara/shown")["sara_training"]
    assert [s["run"] for s in shown].count("shown_00001") == 0  # the same node's, so replaced
    (state,) = [s for s in shown if s["run"] == "halted_00001"]
    assert state["status"] == "cancelled"
    assert "choose halted_00001 under resume" in state["marks"][-1][2]
