"""Several captions of one picture: lines of its own, and tags in other orders."""

from collections import Counter

import pytest

from sara_core.pictures.caption_variants import VariantRule, split_tags
from sara_core.pictures.picture_folder import find_pictures


@pytest.mark.parametrize(
    ("caption", "tags"),
    [
        ("a, b,c ,, d", ["a", "b", "c", "d"]),
        ("saber (fate, stay night), 1girl", ["saber (fate, stay night)", "1girl"]),
        ("(red, (blue, green):1.2), x", ["(red, (blue, green):1.2)", "x"]),
        (r"a \(b, c\), d", [r"a \(b", r"c\)", "d"]),  # an escaped one opens nothing
        ("a) b, c", ["a) b", "c"]),
        ("(a, b", ["(a", "b"]),
        ("1girl, :(, red hair, (x, y), smile", ["1girl", ":(", "red hair", "(x, y)", "smile"]),
        ("a\\", ["a\\"]),
        ("", []),
    ],
)
def test_tags_are_split_at_commas_outside_parentheses(caption, tags):
    assert list(split_tags(caption)) == tags


def test_without_anything_asked_there_is_only_the_caption_as_written():
    assert VariantRule()(["a cat,", "on a  mat"]) == ("a cat, on a  mat", [])
    assert VariantRule()([]) == ("", [])
    assert VariantRule(shuffle=True)(["one tag"]) == ("one tag", [])


def test_lines_are_captions_of_their_own():
    assert VariantRule(lines=True)(["a", "b", "c"]) == ("a", ["a", "b", "c"])
    assert VariantRule(lines=True)(["a"]) == ("a", [])


def test_tags_are_shuffled_behind_those_that_are_kept():
    first, drawn = VariantRule(shuffle=True, keep=2, count=600)(["sks, dog, a, b, c"])
    assert first == "sks, dog, a, b, c"
    orders = Counter(drawn)
    assert all(caption.startswith("sks, dog, ") for caption in drawn)
    assert len(orders) == 6  # all orders of three
    assert min(orders.values()) > 60  # about 100 each


def test_tags_are_left_out_as_often_as_asked_and_kept_ones_never():
    tags = [f"t{i}" for i in range(20)]
    _, drawn = VariantRule(dropout=0.3, keep=5, count=300)([", ".join(tags)])
    counts = Counter(tag for caption in drawn for tag in caption.split(", "))
    assert all(counts[tag] == 300 for tag in tags[:5])
    assert sum(counts[tag] for tag in tags[5:]) / (15 * 300) == pytest.approx(0.7, abs=0.03)
    assert all(
        sorted(caption.split(", "), key=tags.index) == caption.split(", ") for caption in drawn
    )
    assert VariantRule(dropout=1.0, keep=1, count=3)(["a, b, c"])[1] == ["a"] * 3


def test_the_trigger_is_kept_wherever_it_stands():
    rule = VariantRule(dropout=1.0, keep=1, trigger="sks", count=2)
    assert rule(["1girl, photo of SKS, smile"])[1] == ["photo of SKS"] * 2
    assert rule(["1girl, asks, smile"])[1] == ["1girl"] * 2


def test_what_is_drawn_depends_on_seed_and_caption_alone():
    rule = VariantRule(shuffle=True, dropout=0.2)
    lines = ["a, b, c, d, e, f"]
    assert rule(lines) == rule(lines)
    assert rule(lines)[1] != VariantRule(shuffle=True, dropout=0.2, seed=1)(lines)[1]
    assert len(rule(lines)[1]) == 8


def test_lines_and_tags_together_draw_from_every_line():
    rule = VariantRule(lines=True, shuffle=True, keep=1, count=2)
    first, drawn = rule(["a, b", "c, d", "e"])
    assert first == "a, b"
    assert drawn == ["a, b", "c, d", "e"]  # at least one of each


@pytest.mark.parametrize("wrong", [{"dropout": 1.1}, {"keep": -1}, {"count": 0}])
def test_bad_rules_are_refused(wrong):
    with pytest.raises(ValueError, match="expected 0 to 1, at least 0 and at least 1"):
        VariantRule(**wrong)


def test_lines_are_read_from_text_files_and_lists_in_tables(tmp_path):
    for name in "abc":
        (tmp_path / f"{name}.png").write_text("x")
    (tmp_path / "a.txt").write_text("a cat\r\n\r\n  a  small   cat \n")
    (tmp_path / "metadata.jsonl").write_text(
        '{"file_name": "b.png", "text": ["a dog", "a\\n big dog"]}\n'
        '{"file_name": "c.png", "text": []}\n'
    )
    found, problems = find_pictures(tmp_path)
    assert [(f.lines, f.caption) for f in found] == [
        (("a cat", "a small cat"), "a cat a small cat"),
        (("a dog", "a big dog"), "a dog a big dog"),
        ((), None),
    ]
    assert [str(p) for p in problems] == [
        "metadata.jsonl: line 2 has no file_name and text of a picture in the folder"
    ]
