"""Emoji drawn in several styles, as packages carry them: (style, concept) -> a picture on white.

usage: python -m tests.emoji64.pictures OUT.npz     (needs npm, resvg-py, numpy and pillow)

OUT.npz holds `x`, uint8 (styles, concepts, 64, 64, 3), `styles`, `concepts` and `drawn`, bool (styles,
concepts): the concepts of the categories below that the base's three styles draw, and which of them
each other style draws as well; the rest of `x` is white. `subject`, uint8 (faces, 64, 64, 3), and `faces` are
twemoji's cats with red and blue exchanged: one blue cat in several moods, which no style knows.
"""

import io
import json
import re
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import resvg_py
from PIL import Image

from . import BASE_STYLES

PACKAGES = {
    "twemoji": "@iconify-json/twemoji@1.2.5",  # CC BY 4.0, Twitter and contributors
    "noto": "@iconify-json/noto@1.2.9",  # Apache-2.0, Google
    "fluent": "@iconify-json/fluent-emoji-flat@1.2.6",  # MIT, Microsoft
    "noto-v1": "@iconify-json/noto-v1@1.2.5",  # Apache-2.0, Google
    "3d": "@lobehub/fluent-emoji-3d@1.1.0",  # MIT
    "contrast": "@iconify-json/fluent-emoji-high-contrast@1.2.6",  # MIT, Microsoft; black silhouettes
    "openmoji": "@iconify-json/openmoji@1.2.29",  # CC BY-SA 4.0, OpenMoji; black outlines
}
VERSION = 2  # of what OUT.npz holds
CATEGORIES = ("Food & Drink", "Animals & Nature")
SKIN_TONE = re.compile(r"(^|-)(light|medium-light|medium|medium-dark|dark)-skin-tone")


def fetch(style, folder):
    """Unpack a style's package below `folder`, once, and return where it is."""
    target = Path(folder) / style
    if not target.is_dir():
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            subprocess.run(["npm", "pack", "-s", PACKAGES[style]], cwd=scratch, check=True)
            with tarfile.open(next(Path(scratch).glob("*.tgz"))) as archive:
                archive.extractall(Path(scratch) / "out", filter="data")
            (Path(scratch) / "out" / "package").rename(target)
    return target


def on_white(image, size):
    """Centre a transparent picture on white; uint8 (size, size, 3)."""
    image = image.convert("RGBA")
    scale = size / max(image.size)
    if scale != 1:
        wanted = [max(1, round(side * scale)) for side in image.size]
        image = image.resize(wanted, Image.Resampling.LANCZOS)
    canvas = Image.new("RGBA", (size, size), "white")
    canvas.alpha_composite(image, ((size - image.width) // 2, (size - image.height) // 2))
    return np.asarray(canvas.convert("RGB"))


class Drawn:
    """A style drawn as vectors."""

    def __init__(self, folder):
        icons = json.loads((folder / "icons.json").read_text(encoding="utf-8"))
        meta = json.loads((folder / "metadata.json").read_text(encoding="utf-8"))
        self.icons = icons["icons"]
        self.size = icons.get("width", 16), icons.get("height", 16)
        self.category = {
            name: category
            for category, names in meta.get("categories", {}).items()
            for name in names
        }
        self.codes = json.loads((folder / "chars.json").read_text(encoding="utf-8"))

    def names(self):
        """Concepts that it draws."""
        return set(self.icons)

    def render(self, name, size):
        """Picture of a concept; uint8 (size, size, 3)."""
        icon = self.icons[name]
        width, height = icon.get("width", self.size[0]), icon.get("height", self.size[1])
        svg = (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="{icon.get("left", 0)} {icon.get("top", 0)} {width} {height}">'
            f"{icon['body']}</svg>"
        )
        png = resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size, skip_system_fonts=True)
        return on_white(Image.open(io.BytesIO(bytes(png))), size)


class Rendered:
    """A style that comes as picture files named by code point."""

    def __init__(self, folder, codes):
        self.files = {}
        for code, name in codes.items():
            for variant in (code, code.replace("-fe0f", ""), f"{code}-fe0f"):
                file = folder / "assets" / f"{variant}.webp"
                if file.is_file():
                    self.files.setdefault(name, file)

    def names(self):
        """Concepts that it draws."""
        return set(self.files)

    def render(self, name, size):
        """Picture of a concept; uint8 (size, size, 3)."""
        with Image.open(self.files[name]) as image:
            return on_white(image, size)


def read_styles(folder, styles=tuple(PACKAGES)):
    """Styles by name, fetched into `folder` where they are missing."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    twemoji = Drawn(fetch("twemoji", folder))
    read = {"twemoji": twemoji}
    for style in styles:
        if style == "3d":
            read[style] = Rendered(fetch(style, folder), twemoji.codes)
        elif style != "twemoji":
            read[style] = Drawn(fetch(style, folder))
    return {style: read[style] for style in styles}


def concepts(styles, category):
    """Sorted concepts in the model's categories that all its styles draw."""
    common = set.intersection(*(styles[style].names() for style in BASE_STYLES))
    return sorted(
        name for name in common if category.get(name) in CATEGORIES and not SKIN_TONE.search(name)
    )


def blue_cats(style):
    """Moods of one subject: their names, and uint8 (moods, 64, 64, 3)."""
    names = sorted(
        name
        for name, category in style.category.items()
        if category == "Smileys & Emotion" and "cat" in name.split("-")
    )
    return names, np.stack([style.render(name, 64)[..., ::-1] for name in names])


def main(out):
    """Render all styles, and the subject."""
    styles = read_styles(Path(out).parent / "emoji")
    names = concepts(styles, styles["twemoji"].category)
    drawn = np.array([[name in style.names() for name in names] for style in styles.values()])
    x = np.full((*drawn.shape, 64, 64, 3), 255, np.uint8)
    for i, style in enumerate(styles.values()):
        for j in np.flatnonzero(drawn[i]):
            x[i, j] = style.render(names[j], 64)
    faces, subject = blue_cats(styles["twemoji"])
    np.savez_compressed(
        out, x=x, drawn=drawn, styles=list(styles), concepts=names, subject=subject, faces=faces
    )
    for style, count in zip(styles, drawn.sum(1), strict=True):
        print(f"{style}: {count} of {len(names)} concepts")


if __name__ == "__main__":
    main(*sys.argv[1:])
