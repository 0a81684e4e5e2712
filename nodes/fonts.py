"""A font that can draw a text: Pillow's own, or one found on the system."""

from functools import lru_cache

from PIL import ImageFont

# By file name, which Pillow looks for in the system's font folders: Latin, Greek and Cyrillic first, then
# such as hold Chinese, Japanese and Korean as well.
SYSTEM_FONTS = (
    "DejaVuSans.ttf", "NotoSans-Regular.ttf", "LiberationSans-Regular.ttf", "segoeui.ttf", "arial.ttf",
    "Arial Unicode.ttf", "NotoSansCJK-Regular.ttc", "NotoSansCJKjp-Regular.otf", "NotoSansSC-Regular.ttf",
    "wqy-microhei.ttc", "wqy-zenhei.ttc", "msyh.ttc", "YuGothM.ttc", "meiryo.ttc", "PingFang.ttc",
    "Hiragino Sans GB.ttc", "STHeiti Medium.ttc",
)  # fmt: skip
NOT_A_CHARACTER = "\ue123"  # for private use; drawn as what stands for a missing glyph


def font_for(text: str, size: int):
    """Return the font that has glyphs for most characters of a text; Pillow's own if it has all.

    Args:
        text: All that is to be drawn with it.
        size: In pixels.
    """
    wanted = frozenset(character for character in text if not character.isspace())
    fonts = [ImageFont.load_default(size=size)]
    if _missing(fonts[0], wanted):
        fonts += _system_fonts(size)
    return min(fonts, key=lambda font: _missing(font, wanted))


@lru_cache(4)
def _system_fonts(size: int) -> list:
    found = []
    for name in SYSTEM_FONTS:
        try:
            found.append(ImageFont.truetype(name, size))
        except OSError:  # not on this system
            continue
    return found


def _missing(font, characters: frozenset[str]) -> int:
    """Count characters that a font draws as it draws what it has no glyph for."""
    none = _drawn(font, NOT_A_CHARACTER)
    return sum(_drawn(font, character) == none for character in characters)


def _drawn(font, character: str) -> tuple:
    mask = font.getmask(character)
    return mask.size, bytes(mask)
