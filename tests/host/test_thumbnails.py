"""Small pictures of a folder, as the card of SaRA Image Folder asks the server for them."""

import io
import urllib.error
import urllib.parse

from PIL import Image

from .test_image_folder import make


def thumbnail(server, folder, name):
    query = urllib.parse.urlencode({"folder": folder, "name": name})
    try:
        return Image.open(io.BytesIO(server.get(f"/sara/thumbnail?{query}", raw=True)))
    except urllib.error.HTTPError as error:
        return error.code


def test_thumbnails_are_small_and_upright(server):
    lying = Image.new("RGB", (900, 300), "blue")
    lying.paste("red", (0, 0, 450, 300))
    exif = lying.getexif()
    exif[0x0112] = 6  # to be turned right by a quarter
    jpeg, half_clear = io.BytesIO(), Image.new("RGBA", (200, 100), (0, 255, 0, 128))
    lying.save(jpeg, "JPEG", exif=exif)
    files = {"phone.JPG": jpeg.getvalue(), "deep/clear \u732b.png": half_clear, "note.txt": "3d"}
    make(server, "thumbs", **files, **{"broken.png": b"\x89PNG no more"})
    upright = thumbnail(server, "input/thumbs", "phone.JPG")
    assert upright.size == (48, 144)
    top, bottom = (upright.convert("RGB").getpixel((24, y)) for y in (20, 124))
    assert top[0] > 200 > 60 > top[2]
    assert bottom[2] > 200 > 60 > bottom[0]
    clear = thumbnail(server, "input/thumbs", "deep/clear \u732b.png")
    assert (clear.size, clear.mode) == ((144, 72), "RGBA")
    for folder, name in (
        ("input/thumbs", "broken.png"), ("input/thumbs", "note.txt"), ("input/thumbs", "none.png"),
        ("input/thumbs", "../../models/checkpoints/emoji64.safetensors"), ("input/thumbs", "deep"),
        ("output", "x.png"), ("", ""), ("input/../output", "x.png"), ("input/thumbs", "a\0.png"),
    ):  # fmt: skip
        assert thumbnail(server, folder, name) == 404, (folder, name)


def test_a_link_out_of_the_folders_has_no_thumbnail(server, tmp_path):
    Image.new("RGB", (20, 20)).save(tmp_path / "secret.png")
    folder = make(server, "linked")
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    assert thumbnail(server, "input/linked", "link.png") == 404
    Image.new("RGB", (20, 20)).save(folder / "own.png")
    assert thumbnail(server, "input/linked", "own.png").size == (20, 20)
