"""Several captions of a picture, from the folder to the trained delta."""

import json
import re

from .graphs import Graph, emoji64
from .test_image_folder import folder_node, make, noise


def test_training_draws_from_lines_and_shuffled_tags(server):
    folder = make(server, "several", **{f"{i}.png": noise(64, 64, 40 + i) for i in range(3)})
    (folder / "0.txt").write_text("sks, round, red, shiny\nsks, a fruit")
    (folder / "1.txt").write_text("sks")
    (folder / "metadata.jsonl").write_text(
        json.dumps({"file_name": "2.png", "text": ["sks, one", "sks, two"]})
    )
    graph = Graph(server)
    checkpoint, model, _ = emoji64(graph)
    node = folder_node(
        graph, checkpoint, "input/several", caption_lines=True, shuffle_tags=True, tag_dropout=0.3,
        caption_variants=6, trigger="sks",
    )  # fmt: skip
    graph("PreviewImage", images=node.out(4))
    train = graph(
        "SaraTrain", model=model, latents=node, positive=node.out(1), empty=node.out(3),
        steps=4, batch_size=2, output_name="several",
    )  # fmt: skip
    told = graph.run()
    (line,) = [x for x in told[node]["text"][0].splitlines() if x.startswith("captions to draw")]
    assert re.fullmatch(r"captions to draw from: \d+, of 2 pictures", line)
    assert "saved several_" in told[train]["text"][0]
