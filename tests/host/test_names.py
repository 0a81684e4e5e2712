"""Names of runs and files: how long they may be, and the date in them."""

import time

import pytest

from ..harness.server import PromptError
from .graphs import Graph


@pytest.fixture
def output(sara, monkeypatch, tmp_path):
    monkeypatch.setattr(sara.host, "output_root", lambda: str(tmp_path / "output" / "sara"))
    return sara.output


def test_a_name_that_can_be_saved_under_is_told_by_its_bytes(output):
    assert output.split_output_name("猫" * 30)[1] == "猫" * 30
    with pytest.raises(ValueError, match="has 225 bytes, but with what is added.*room for 186"):
        output.split_output_name("猫" * 75)
    with pytest.raises(ValueError, match="has 200 bytes"):
        output.split_output_name("a" * 200 + "/b")
    with pytest.raises(ValueError, match="has 225 bytes"):
        output.checked_prefix("sara/" + "猫" * 75)


def test_the_longest_name_can_be_saved_under(output, sara, tmp_path):
    from sara_pack.sara_core.files.atomic import replace_atomically

    longest = 255 - output.ADDED
    parent, name = output.split_output_name("x" * longest)
    folder = sara.folder.RunFolder.create(parent, name, sara.settings.RunSettings(steps=1_000_000))
    path = output.lora_path(output.final_path(folder.path, 1_000_000))
    replace_atomically(path, lambda file: file.write_bytes(b"there"))
    assert path.read_bytes() == b"there"
    folder.close()
    with pytest.raises(ValueError, match="shorten it"):
        output.split_output_name("x" * (longest + 1))


def test_dates_are_filled_in_as_in_save_image(output, monkeypatch):
    now = time.struct_time((2031, 2, 3, 4, 5, 6, 0, 34, 0))
    monkeypatch.setattr(time, "localtime", lambda: now)
    filled = output.with_date(
        "%year%-%month%-%day% %hour%%minute%%second% %date:yyyy-M-dd hh:m:ss%"
    )
    assert filled == "2031-02-03 040506 2031-2-03 04:5:06"
    assert output.with_date("%date%") == "20310203040506"
    assert output.with_date("100% style, %width%") == "100% style, %width%"
    assert output.split_output_name("%date:yy%/style")[0].endswith("31")


def test_a_loaded_delta_may_be_named_by_a_connection(server, delta_name):
    graph = Graph(server)
    name = graph("PrimitiveString", value=delta_name)
    loaded = graph("SaraLoadDelta", delta_name="choose a delta", file=name)
    graph("PreviewAny", source=loaded.out(1))
    graph.run()
    graph = Graph(server)
    graph("PreviewAny", source=graph("SaraLoadDelta", delta_name="choose a delta").out(1))
    with pytest.raises(PromptError, match="choose a delta first"):
        graph.run()


def test_one_damaged_checkpoint_is_left_out_and_said(server, trained):
    (run,) = (server.base / "output" / "sara").glob("shared_*")
    broken = run / "checkpoint_0000001_steps.safetensors"
    broken.write_bytes(b"\x10\0\0\0\0\0\0\0no safetensors.")
    try:
        graph = Graph(server)
        node = graph("SaraLoadCheckpoints", run=run.name)
        graph("PreviewAny", source=node.out(1))
        text = graph.run()[node]["text"][0]
    finally:
        broken.unlink()
    assert "left out: " in text
    assert broken.name in text


def test_resume_of_another_kind_is_refused_in_words(sara):
    from sara_pack.nodes.training.train import SaraTrain

    assert "resume is 3; expected 'new run'" in SaraTrain.validate_inputs([3])
    assert "resume is ['a']; expected" in SaraTrain.validate_inputs([["a"]])
