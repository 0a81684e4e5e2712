"""The pack's texts in every language: nothing missing, nothing left over.

`LOCALES=write` writes the English texts of the nodes anew, as the nodes give them.
"""

import json
import os
import re
from pathlib import Path

import pytest

LOCALES = Path(__file__).resolve().parents[2] / "locales"
LANGUAGES = ("zh", "ja", "de", "fr")


def read(language, name):
    return json.loads((LOCALES / language / f"{name}.json").read_text(encoding="utf-8"))


def told(name, thing):
    return {"name": name, **({"tooltip": thing.tooltip} if thing.tooltip else {})}


def nodes():
    """What the nodes say of themselves, in the shape of nodeDefs.json."""
    from sara_pack.nodes import NODES, host

    host.register_folders()
    definitions = {}
    for node in NODES:
        schema = node.define_schema()
        definitions[schema.node_id] = {
            "display_name": schema.display_name,
            "description": schema.description,
            "inputs": {one.id: told(one.display_name or one.id, one) for one in schema.inputs},
            "outputs": {
                str(i): told(one.display_name, one) for i, one in enumerate(schema.outputs)
            },
        }
    return definitions


def paths(tree, at=""):
    """Every text by its place."""
    if isinstance(tree, str):
        return {at: tree}
    return {k: v for key, part in tree.items() for k, v in paths(part, f"{at}/{key}").items()}


def test_english_is_what_the_nodes_say():
    if os.environ.get("LOCALES") == "write":
        text = json.dumps(nodes(), indent=2, ensure_ascii=False) + "\n"
        (LOCALES / "en" / "nodeDefs.json").write_text(text, encoding="utf-8")
    assert read("en", "nodeDefs") == nodes()


def test_every_input_and_output_has_a_tooltip():
    for place in paths(nodes()):
        if place.endswith("/name"):
            assert f"{place[:-5]}/tooltip" in paths(nodes()), place


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("name", ["nodeDefs", "main"])
def test_no_text_is_missing_or_left_over(language, name):
    english, other = paths(read("en", name)), paths(read(language, name))
    assert sorted(other) == sorted(english)
    for place, text in other.items():
        assert text.strip(), place
        holes = re.compile(r"\{\w+\}")
        assert sorted(holes.findall(text)) == sorted(holes.findall(english[place])), place
        if place.endswith(("/tooltip", "/description")):
            assert text != english[place], place


def test_every_text_the_scripts_ask_for_is_there():
    scripts = "".join(path.read_text() for path in (LOCALES.parent / "js").glob("*.js"))
    asked = set(re.findall(r'\btext\("(\w+)"', scripts))
    states = {"training", "stopped", "cancelled", "finished"}  # asked for by the state's name
    assert asked | states == set(read("en", "main")["sara"])
