"""Pictures and captions in the layouts people have; nothing outside the folder is read."""

import json
import os

import pytest

from sara_core.pictures.captions import with_trigger
from sara_core.pictures.picture_folder import describe_files, find_pictures


def put(folder, **files):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


def captions(folder):
    found, problems = find_pictures(folder)
    return {f.name: (f.caption, f.source) for f in found}, [str(p) for p in problems]


def test_text_files_beside_pictures(tmp_path):
    put(tmp_path, **{
        "a.png": "x", "a.txt": "\ufeffa cat,\r\n on a mat \r\n",
        "B.JPEG": "x", "B.caption": "a dog",
        "c.webp": "x", "c.webp.txt": "named after the whole file",
        "d.GIF": "x", "e.tif": "x", "e.txt": b"\xff\xfe" + "zwei Bäume".encode("utf-16-le"),
        "notes.md": "no picture", "._a.png": "x", ".hidden.png": "x", "empty.png": "x",
        "empty.txt": "",
    })  # fmt: skip
    found, problems = captions(tmp_path)
    assert found == {
        "a.png": ("a cat, on a mat", ".txt"), "B.JPEG": ("a dog", ".caption"),
        "c.webp": ("named after the whole file", ".txt"), "d.GIF": (None, ""),
        "e.tif": ("zwei Bäume", ".txt"), "empty.png": (None, ""),
    }  # fmt: skip
    assert problems == ["notes.md: not a picture"]


def test_order_is_natural():
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        put(folder, **{f"p{i}.png": "x" for i in (10, 2, 1, 33, 4)})
        assert [f.name for f in find_pictures(folder)[0]] == [
            "p1.png", "p2.png", "p4.png", "p10.png", "p33.png",
        ]  # fmt: skip


def test_metadata_jsonl_as_hugging_face_writes_it(tmp_path):
    rows = [
        {"file_name": "a.png", "text": "from the table"},
        {"file_name": "train/b.jpg", "text": "below"},
        {"file_name": "c.png", "text": "loses"},
        {"file_name": "gone.png", "text": "no file"},
        {"file_name": "x.png"},
    ]
    lines = "\r\n".join(json.dumps(row) for row in rows) + "\n{broken\n"
    put(tmp_path, **{"metadata.jsonl": lines, "a.png": "x", "train/b.jpg": "x", "c.png": "x",
                     "c.txt": "wins", "other/d.png": "x"})  # fmt: skip
    found, problems = captions(tmp_path)
    assert found == {
        "a.png": ("from the table", "metadata.jsonl"),
        "c.png": ("wins", ".txt"),
        "train/b.jpg": ("below", "metadata.jsonl"),
    }
    assert problems == [
        "metadata.jsonl: line 5 has no file_name and text of a picture in the folder",
        "metadata.jsonl: line 6 has no file_name and text of a picture in the folder",
        "other: pictures in it are not taken (1); turn subfolders on, or choose it itself",
        "gone.png: named in metadata.jsonl, but there is no such picture",
    ]


@pytest.mark.parametrize(
    "table",
    [
        {"a.png": "one", "b.png": "two"},
        {"a.png": {"caption": "one"}, "b.png": {"text": "two"}},
        [{"file_name": "a.png", "text": "one"}, {"image": "b.png", "caption": "two"}],
    ],
)
def test_captions_json_in_its_usual_shapes(tmp_path, table):
    put(tmp_path, **{"captions.json": json.dumps(table), "a.png": "x", "b.png": "x"})
    found, problems = captions(tmp_path)
    assert {k: v[0] for k, v in found.items()} == {"a.png": "one", "b.png": "two"}
    assert not problems


def test_repeat_folders(tmp_path):
    put(tmp_path, **{"10_sks dog/a.png": "x", "10_sks dog/b.png": "x", "10_sks dog/b.txt": "b",
                     "2_my_cat/c.png": "x", "plain/d.png": "x", "e.png": "x"})  # fmt: skip
    found, _ = find_pictures(tmp_path)
    assert {(f.name, f.caption, f.source, f.repeats) for f in found} == {
        ("10_sks dog/a.png", "sks dog", "folder name", 10),
        ("10_sks dog/b.png", "b", ".txt", 10),
        ("2_my_cat/c.png", "my cat", "folder name", 2),
        ("e.png", None, "", 1),
    }


def test_repeats_that_cannot_be_meant_are_told(tmp_path):
    put(tmp_path, **{"0_off/a.png": "x", "2023_holiday/b.png": "x", "c.png": "x"})
    found, problems = captions(tmp_path)
    assert list(found) == ["c.png"]
    assert sorted(problems) == [
        "0_off: its name asks for 0 repeats, so it is left out; rename the folder",
        "2023_holiday: its name asks for 2023 repeats, so it is left out; rename the folder",
    ]


def test_endings_in_any_case_and_rare_line_ends(tmp_path):
    row = json.dumps({"file_name": "b.png", "text": "one\u2028two\x85three"}, ensure_ascii=False)
    put(tmp_path, **{"a.PNG": "x", "A.TXT": "found", "b.png": "x", "metadata.jsonl": row + "\n"})
    found, problems = captions(tmp_path)
    assert found == {"a.PNG": ("found", ".txt"), "b.png": ("one two three", "metadata.jsonl")}
    assert not problems


def test_tables_may_spell_names_in_another_case_or_form(tmp_path):
    rows = {"A.png": "other case", "b.png": "exact", "caf\u00e9.png": "composed", "SUB/d.PNG": "x",
            "sub/D.png": "in a folder"}  # fmt: skip
    lines = "\n".join(json.dumps({"file_name": n, "text": t}) for n, t in rows.items())
    put(tmp_path, **{"a.PNG": "x", "b.png": "x", "B.png": "x", "cafe\u0301.png": "x",
                     "sub/d.png": "x", "metadata.jsonl": lines})  # fmt: skip
    found, problems = captions(tmp_path)
    assert found == {
        "a.PNG": ("other case", "metadata.jsonl"),
        "b.png": ("exact", "metadata.jsonl"),
        "B.png": (None, ""),
        "cafe\u0301.png": ("composed", "metadata.jsonl"),
        "sub/d.png": ("in a folder", "metadata.jsonl"),
    }
    assert problems == ["SUB/d.PNG: named in metadata.jsonl, but there is no such picture"]


def test_names_longer_than_a_file_can_have(tmp_path):
    long = "p" * 245 + ".png"
    rows = json.dumps({"file_name": "q" * 300 + ".png", "text": "t"})
    put(tmp_path, **{long: "x", "metadata.jsonl": rows})
    found, problems = captions(tmp_path)
    assert found == {long: (None, "")}
    assert len(problems) == 1
    assert problems[0].endswith("named in metadata.jsonl, but there is no such picture")


def test_nothing_outside_the_folder_is_read(tmp_path):
    put(tmp_path, **{"secret.png": "x", "secret.txt": "secret"})
    folder = tmp_path / "folder"
    rows = [
        {"file_name": name, "text": "t"}
        for name in ("../secret.png", str(tmp_path / "secret.png"), "C:\\secret.png",
                     "a\\..\\..\\secret.png", "a\0.png", "\\\\host\\share.png", "..", "")
    ]  # fmt: skip
    put(folder, **{"metadata.jsonl": "\n".join(map(json.dumps, rows)), "ok.png": "x",
                   "captioned.png": "x"})  # fmt: skip
    os.symlink(tmp_path / "secret.png", folder / "link.png")
    os.symlink(tmp_path / "secret.txt", folder / "captioned.txt")
    os.symlink(tmp_path, folder / "5_outside")
    found, problems = captions(folder)
    assert found == {"ok.png": (None, "")}
    assert "link.png: a link that leads out of the folder" in problems
    assert "5_outside: a link that leads out of the folder" in problems
    assert "captioned.png: its caption cannot be read: captioned.txt is a link that leads out of " \
        "the folder" in problems  # fmt: skip
    assert sum("metadata.jsonl: line" in p for p in problems) == len(rows)


def test_a_table_that_leads_out_is_not_read(tmp_path):
    put(tmp_path, **{"real.jsonl": '{"file_name": "a.png", "text": "secret"}'})
    folder = tmp_path / "folder"
    put(folder, **{"a.png": "x", "captions.json": "[1, {", "b.png": "x", "b.txt": b"\xe4\xf6"})
    os.symlink(tmp_path / "real.jsonl", folder / "metadata.jsonl")
    found, problems = captions(folder)
    assert found == {"a.png": (None, "")}
    assert any(p.startswith("metadata.jsonl: cannot be read: a link") for p in problems)
    assert any(p.startswith("captions.json: cannot be read") for p in problems)
    assert "b.png: its caption cannot be read: b.txt is not in UTF-8; save it as UTF-8" in problems


def test_any_change_is_noticed_and_nothing_else(tmp_path):
    put(tmp_path, **{"a.png": "x", "a.txt": "t", "5_b/c.png": "y", "other.bin": "z"})
    before = describe_files(tmp_path)
    assert describe_files(tmp_path) == before
    put(tmp_path, **{".DS_Store": "z"})
    os.utime(tmp_path, ns=(before[0][2], before[0][2]))  # the folder itself has changed by it
    assert [entry[0] for entry in describe_files(tmp_path)] == [entry[0] for entry in before]
    for change in ({"a.txt": "u"}, {"a.png": "w"}, {"5_b/c.txt": "new"}, {"metadata.jsonl": "{}"}):
        put(tmp_path, **change)
        after = describe_files(tmp_path)
        assert after != before
        before = after
    (tmp_path / "a.txt").unlink()
    assert describe_files(tmp_path) != before


def test_trigger_is_put_before_captions_that_lack_it():
    assert with_trigger("a cat", "sks") == "sks, a cat"
    assert with_trigger("sks, a cat", "sks") == "sks, a cat"
    assert with_trigger("photo of sks cat", "sks") == "photo of sks cat"
    assert with_trigger("a photo of SKS, dog", "sks") == "a photo of SKS, dog"
    assert with_trigger("asks why", "sks") == "sks, asks why"
    assert with_trigger("", "sks") == "sks"
    assert with_trigger("a cat", " ") == "a cat"


PNG, JPEG = b"\x89PNG\r\n\x1a\n...", b"\xff\xd8\xff..."


def test_whatever_is_not_used_is_named_with_the_reason(tmp_path):
    put(tmp_path, **{
        "a.png": PNG, "noending": JPEG, "moving.apng": PNG, "b.jxl": b"\xff\x0a..", "c.jp2": "x",
        "d.tga": "x", "e.psd": b"8BPS", "f.exr": b"\x76\x2f\x31\x01", "g.dat": b"8BPS", "h.txt": "alone",
        "readme.md": "text", "Thumbs.db": "x", ".DS_Store": "x", "more/i.png": PNG, "more/deep/j.png": PNG,
        "void/k.txt": "x",
    })  # fmt: skip
    os.symlink(tmp_path / "nowhere.png", tmp_path / "link.png")
    found, problems = captions(tmp_path)
    assert list(found) == ["a.png", "moving.apng", "noending"]
    format = "its format, {}, is not read; save it as PNG or JPEG".format
    assert sorted(problems) == [
        f"b.jxl: {format('JPEG XL')}",
        f"c.jp2: {format('JPEG 2000')}",
        f"d.tga: {format('Targa')}",
        f"e.psd: {format('Photoshop')}",
        f"f.exr: {format('OpenEXR')}",
        f"g.dat: {format('Photoshop')}",
        "h.txt: a caption without a picture of its name",
        "link.png: a link to something that is not there",
        "more: pictures in it are not taken (2); turn subfolders on, or choose it itself",
        "readme.md: not a picture",
    ]


def test_subfolders_are_taken_if_asked(tmp_path):
    put(tmp_path, **{"a.png": "x", "more/b.png": "x", "more/b.txt": "b", "more/deep/c.png": "x",
                     "more/3_x/d.png": "x", ".git/e.png": "x", "more/deep/metadata.csv":
                     "file_name,text\nc.png,from a table"})  # fmt: skip
    os.symlink(tmp_path / "more", tmp_path / "more" / "round")
    found, problems = find_pictures(tmp_path, recurse=True)
    assert [(f.name, f.caption, f.repeats) for f in found] == [
        ("a.png", None, 1), ("more/3_x/d.png", "x", 3), ("more/b.png", "b", 1),
        ("more/deep/c.png", "from a table", 1),
    ]  # fmt: skip
    assert not problems


def test_a_folder_of_repeats_means_the_same_chosen_itself(tmp_path):
    folder = tmp_path / "10_sks dog"
    put(folder, **{"a.png": "x", "b.png": "x", "b.txt": "b"})
    (inside, chosen) = (find_pictures(where)[0] for where in (tmp_path, folder))
    meaning = [(f.caption, f.source, f.repeats) for f in inside]
    assert meaning == [("sks dog", "folder name", 10), ("b", ".txt", 10)]
    assert [(f.caption, f.source, f.repeats) for f in chosen] == meaning


@pytest.mark.parametrize("name", ["metadata.csv", "Captions.JSONL", "METADATA.jsonl"])
@pytest.mark.parametrize("folder", ["", "10_name/"])
def test_tables_of_other_trainers_are_read(tmp_path, name, folder):
    row = {"file_name": "a.png", "text": 'a "cat", sat'}
    text = 'file_name,text\r\na.png,"a ""cat"", sat"\r\n' if "csv" in name else json.dumps(row)
    put(tmp_path, **{f"{folder}a.png": "x", f"{folder}{name}": text})
    found, problems = captions(tmp_path)
    assert found == {f"{folder}a.png": ('a "cat", sat', name)}
    assert not problems


def test_a_caption_is_found_by_its_exact_name_first(tmp_path):
    put(tmp_path, **{"a.png": "x", "a.txt": "exact", "A.TXT": "other case", "B.png": "x", "b.txt": "cased",
                     "caf\u00e9.png": "x", "cafe\u0301.txt": "composed"})  # fmt: skip
    found, problems = captions(tmp_path)
    assert {name: text for name, (text, _) in found.items()} == {
        "a.png": "exact", "B.png": "cased", "caf\u00e9.png": "composed",
    }  # fmt: skip
    assert not problems


def test_nothing_behind_a_link_is_read(tmp_path, monkeypatch):
    put(tmp_path, **{"outside/a.png": PNG, "outside/b": PNG})
    folder = tmp_path / "folder"
    put(folder, **{"c.png": "x"})
    os.symlink(tmp_path / "outside", folder / "link")
    os.symlink(tmp_path / "outside" / "b", folder / "d")
    for recurse in (False, True):
        found, problems = find_pictures(folder, recurse)
        assert [file.name for file in found] == ["c.png"]
        assert [str(problem) for problem in problems] == [
            "d: not a picture", "link: a link to a folder, which is not followed",
        ]  # fmt: skip


@pytest.mark.parametrize(
    ("data", "text", "guessed"),
    [
        ("Frau am Café".encode("cp1252"), "Frau am Café", "cp1252"),
        ("“a cat’s” – Łódź".encode(), "“a cat’s” – Łódź", None),
        ("it’s a cat".encode("cp1252"), "it’s a cat", "cp1252"),
        ("a cat".encode("utf-16-le"), "a cat", "utf-16-le"),
        ("a cat".encode("utf-16-be"), "a cat", "utf-16-be"),
        ("a cat".encode("utf-16"), "a cat", None),
        ("a cat".encode("utf-32"), "a cat", None),
        ("a cat".encode("utf-32-le"), "a cat", "utf-32-le"),
        ("a cat".encode("utf-32-be"), "a cat", "utf-32-be"),
        ("一只小狗".encode("gbk"), None, None),
        ("a photo of 狗".encode("gbk"), None, None),
        ("猫の写真".encode("shift-jis"), None, None),
        ("фото кошки".encode("cp1251"), None, None),
        (b"\x00\x01\x02\x80\xff\x00\x00", None, None),
        (bytes(range(64)) * 4, None, None),
    ],
)
def test_captions_in_any_encoding_are_read_or_reported(tmp_path, data, text, guessed):
    put(tmp_path, **{"a.png": "x", "a.txt": data})
    found, problems = find_pictures(tmp_path)
    if text is None:
        assert not found
        assert "a.txt is not in UTF-8; save it as UTF-8" in problems[0].reason
        return
    assert found[0].caption == text
    notes = [f"a.txt is taken for {guessed}; save it as UTF-8 if it looks wrong"] if guessed else []
    assert [problem.reason for problem in problems] == notes
    assert all(problem.is_note for problem in problems)


def test_captions_of_several_lines_in_a_table_keep_their_words_apart(tmp_path):
    text = 'file_name,text\na.png,"line one\nline two"\nb.png,half\u2028way\n'
    put(tmp_path, **{"a.png": "x", "b.png": "x", "metadata.csv": text})
    found, problems = captions(tmp_path)
    assert {name: caption for name, (caption, _) in found.items()} == {
        "a.png": "line one line two", "b.png": "half way",
    }  # fmt: skip
    assert not problems
