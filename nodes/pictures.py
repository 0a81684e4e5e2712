"""Read picture files with Pillow: upright, in sRGB, without transparency, whole or not at all."""

import contextlib
import io
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, ImageColor, ImageFile, ImageOps

logger = logging.getLogger("comfyui-sara")

MAX_PIXELS = 200_000_000  # a phone's largest; beyond it a file is taken for a decompression bomb
SMALLEST_SIDE = 16
SWAPPED = (5, 6, 7, 8)  # EXIF orientations that exchange width and height
ORIENTATION = 0x0112
SIXTEEN_BIT = ("I;16", "I;16L", "I;16B", "I;16N", "I")


@dataclass(frozen=True)
class Picture:
    """A decoded picture.

    Args:
        colour: Mode RGB, upright, in sRGB, composited on the background.
        opacity: Mode L, the same size, or None if the file has no transparency.
    """

    colour: Image.Image
    opacity: Image.Image | None


def picture_size(path: Path) -> tuple[int, int]:
    """Return width and height of a picture as it is seen, without decoding it.

    Raises:
        ValueError: Not a picture, too small, or suspiciously large; the message says which.
    """
    with _opened(path) as image:
        width, height = image.size
        if min(width, height) < SMALLEST_SIDE:
            raise ValueError(f"it is tiny, {width}x{height} pixels")
        orientation = None
        with contextlib.suppress(Exception):  # broken EXIF data turn nothing
            orientation = image.getexif().get(ORIENTATION)
        if orientation not in SWAPPED:
            return width, height
        if image.format == "TIFF":  # some versions of Pillow have turned its size already
            return read_picture(path).colour.size
        return height, width


def read_picture(path: Path, background: str = "white") -> Picture:
    """Decode a picture file.

    Args:
        path: Of a file in any format Pillow reads; the first frame counts.
        background: Colour under transparent areas, as CSS writes it.

    Raises:
        ValueError: It cannot be decoded to its end; the message says why.
    """
    with _opened(path) as image:
        try:
            image.load()
        except Exception as error:  # decoders raise anything
            raise ValueError(f"it is damaged or cut off ({error})") from error
        with contextlib.suppress(Exception):
            ImageOps.exif_transpose(image, in_place=True)
        profile = image.info.get("icc_profile")
        opacity = _opacity(image)
        if image.mode == "LAB":
            profile = None  # it is the conversion from Lab that counts
        colour = _to_srgb(_eight_bit(image), profile, path.name)
        if opacity is not None:
            ground = Image.new("RGB", colour.size, ImageColor.getrgb(background)[:3])
            colour = Image.composite(colour, ground, opacity)
        return Picture(colour, opacity)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    if path.stat().st_size == 0:
        raise ValueError("it is empty")
    tolerant, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
    largest, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None  # our own limit is below
    try:
        try:
            image = Image.open(io.BytesIO(path.read_bytes()))
        except Exception as error:
            raise ValueError(f"it is not a picture that can be read ({_why(error)})") from error
        with image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(
                    f"it claims {image.width}x{image.height} pixels; more than {MAX_PIXELS:,} are "
                    "not decoded"
                )
            yield image
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS = tolerant, largest


def _why(error: Exception) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        return "its content is of no known format"
    return str(error) or type(error).__name__


def _opacity(image: Image.Image) -> Image.Image | None:
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        alpha = image.convert("RGBA").getchannel("A")
    elif "transparency" in image.info and image.mode in ("P", "L", "RGB", "1", *SIXTEEN_BIT):
        if image.mode in SIXTEEN_BIT:
            clear = np.asarray(image) == image.info["transparency"]
            alpha = Image.fromarray(np.where(clear, 0, 255).astype(np.uint8))
        else:
            alpha = image.convert("RGBA").getchannel("A")
    else:
        return None
    return None if alpha.getextrema() == (255, 255) else alpha


def _eight_bit(image: Image.Image) -> Image.Image:
    """Turn palettes, 16-bit and floating-point pictures into L, RGB or CMYK."""
    if image.mode in SIXTEEN_BIT:
        values = np.asarray(image).astype(np.float64)
        return Image.fromarray(np.clip(np.round(values / 257), 0, 255).astype(np.uint8))
    if image.mode == "F":
        values = np.nan_to_num(np.asarray(image).astype(np.float64))
        scale = 255 if values.max(initial=0) <= 1 else 1
        return Image.fromarray(np.clip(np.round(values * scale), 0, 255).astype(np.uint8))
    if image.mode in ("L", "RGB", "CMYK"):
        return image.copy()
    if image.mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        return ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB")
    if image.mode in ("1", "LA", "La"):
        return image.convert("RGBA" if image.mode == "La" else "L").convert("L")
    return image.convert("RGBA").convert("RGB") if image.mode != "HSV" else image.convert("RGB")


def _to_srgb(image: Image.Image, profile: bytes | None, name: str) -> Image.Image:
    if profile:
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            if "srgb" not in ImageCms.getProfileDescription(source).lower():
                target = ImageCms.createProfile("sRGB")
                return ImageCms.profileToProfile(image, source, target, outputMode="RGB")
        except (ImageCms.PyCMSError, OSError, ValueError) as error:
            logger.warning("%s: its colour profile is ignored, %s", name, error)
    return image.convert("RGB")
