"""Read picture files with Pillow: upright, in sRGB, without transparency, whole or not at all."""

import contextlib
import io
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, ImageColor, ImageFile, ImageOps

with contextlib.suppress(ImportError):  # for the pictures of some phones
    import pillow_heif

    pillow_heif.register_heif_opener()

logger = logging.getLogger("comfyui-sara")

MAX_PIXELS = 200_000_000  # a phone's largest; beyond it a file is taken for a decompression bomb
MAX_BYTES = 1 << 30
SMALLEST_SIDE = 16
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "DIB", "TIFF", "GIF", "AVIF", "HEIF")
SWAPPED = (5, 6, 7, 8)  # EXIF orientations that exchange width and height
ORIENTATION = 0x0112
SIXTEEN_BIT = ("I;16", "I;16L", "I;16B", "I;16N", "I")
STRIP = 1 << 20  # pixels converted at a time


@dataclass(frozen=True)
class Picture:
    """A decoded picture.

    Args:
        colour: Mode RGB, upright, in sRGB, composited on the background.
        opacity: Mode L, the same size, or None if the file has no transparency.
    """

    colour: Image.Image
    opacity: Image.Image | None


def read_file(path: Path) -> bytes:
    """Read a picture file.

    Raises:
        ValueError: It is empty or larger than any picture; the message says which.
        OSError: It cannot be read.
    """
    size = path.stat().st_size
    if size == 0:
        raise ValueError("it is empty")
    if size > MAX_BYTES:
        raise ValueError(f"it has {size:,} bytes; more than {MAX_BYTES:,} are not read")
    return path.read_bytes()


def picture_size(data: bytes, name: str = "") -> tuple[int, int]:
    """Return width and height of a picture as it is seen, where possible without decoding it.

    Args:
        data: Content of the file.
        name: Its name, to tell what is missing to read it.

    Raises:
        ValueError: Not a picture, too small, or suspiciously large; the message says which.
    """
    with _opened(data, name) as image:
        width, height = image.size
        if min(width, height) < SMALLEST_SIDE:
            raise ValueError(f"it is tiny, {width}x{height} pixels")
        may_be_turned = image.format != "PNG" or b"eXIf" in data or b"rientation" in data
        orientation = None
        with contextlib.suppress(Exception):  # broken EXIF data turn nothing
            orientation = image.getexif().get(ORIENTATION) if may_be_turned else None
        if orientation not in SWAPPED:
            return width, height
        if image.format == "TIFF":  # some versions of Pillow have turned its size already
            return read_picture(data, name=name).colour.size
        return height, width


def read_picture(data: bytes, background: str = "white", name: str = "") -> Picture:
    """Decode a picture; of an animation, the first frame.

    A JPEG whose end is missing but marked cannot be told from a whole one.

    Args:
        data: Content of a file in one of FORMATS.
        background: Colour under transparent areas, as CSS writes it.
        name: Name of the file, for messages.

    Raises:
        ValueError: It cannot be decoded to its end; the message says why.
    """
    with _opened(data, name) as image:
        try:
            if image.format == "PNG":  # decoding alone does not look at checksums
                with _opened(data, name) as again:
                    again.verify()
            image.load()
            with contextlib.suppress(Exception):
                ImageOps.exif_transpose(image, in_place=True)
            profile = None if image.mode == "LAB" else image.info.get("icc_profile")
            opacity = _opacity(image)
            colour = _to_srgb(eight_bit(image), profile, name)
            if opacity is not None:
                ground = Image.new("RGB", colour.size, ImageColor.getrgb(background)[:3])
                colour = Image.composite(colour, ground, opacity)
        except Exception as error:  # decoders raise anything
            raise ValueError(f"it is damaged or cut off ({_why(error)})") from error
        return Picture(colour, opacity)


def readable_formats() -> list[str]:
    """Return those of `FORMATS` that Pillow can read here; no others are tried, whatever a file is called."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


@contextlib.contextmanager
def _opened(data: bytes, name: str) -> Iterator[Image.Image]:
    """Open a picture, strictly, whatever other packs have set in Pillow for the whole process."""
    tolerant, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
    largest, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, MAX_PIXELS
    try:
        try:
            image = Image.open(io.BytesIO(data), formats=readable_formats())
        except Image.DecompressionBombError as error:
            raise ValueError(f"it is taken for a decompression bomb ({error})") from error
        except Exception as error:
            if _is_heic(data, name) and "HEIF" not in Image.OPEN:
                raise ValueError(
                    "Pillow alone cannot read HEIC; install pillow-heif or save it as JPEG"
                ) from error
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


def _is_heic(data: bytes, name: str) -> bool:
    brands = (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1")
    by_content = data[4:8] == b"ftyp" and data[8:12] in brands
    return by_content or name.lower().endswith((".heic", ".heif"))


def _why(error: Exception) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        return "its content is of no known format"
    return str(error) or type(error).__name__


def _opacity(image: Image.Image) -> Image.Image | None:
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        alpha = image.convert("RGBA").getchannel("A")
    elif "transparency" in image.info and image.mode in SIXTEEN_BIT:
        clear = np.asarray(image) == image.info["transparency"]
        alpha = Image.fromarray(np.where(clear, 0, 255).astype(np.uint8))
    elif "transparency" in image.info and image.mode in ("P", "L", "RGB", "1"):
        alpha = image.convert("RGBA").getchannel("A")
    else:
        return None
    return None if alpha.getextrema() == (255, 255) else alpha


def eight_bit(image: Image.Image) -> Image.Image:
    """Turn palettes, 16-bit and floating-point pictures into L, RGB or CMYK."""
    if image.mode in SIXTEEN_BIT and image.mode != "I":
        return _scaled(np.asarray(image), 1 / 257)
    if image.mode in ("I", "F"):
        values = np.nan_to_num(np.asarray(image))
        return _scaled(values, 255 / _white(values))
    if image.mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        return ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB")
    if image.mode in ("L", "RGB", "CMYK"):
        return image.copy()
    if image.mode in ("1", "LA"):
        return image.convert("L")
    return image.convert("RGB") if image.mode == "HSV" else image.convert("RGBA").convert("RGB")


def _white(values: np.ndarray) -> float:
    """Guess which number is white in a grey picture, from its largest.

    It is that of 8 or 16 bits, or 1 for broken numbers. Where broken ones go somewhat beyond 1, and where
    any go beyond 16 bits, the largest is white.
    """
    largest = float(values.max(initial=0))
    if np.issubdtype(values.dtype, np.integer):
        steps = (255.0, 65535.0)
    else:
        steps = (1.0,) if largest < 16 else (255.0, 65535.0)
    return next((step for step in steps if largest <= step), largest)


def _scaled(values: np.ndarray, factor: float) -> Image.Image:
    """Scale numbers to 0..255, a few rows at a time."""
    result = np.empty(values.shape, np.uint8)
    rows = max(1, STRIP // values.shape[1])
    for start in range(0, len(values), rows):
        part = values[start : start + rows].astype(np.float32) * np.float32(factor)
        result[start : start + rows] = np.clip(np.rint(part), 0, 255)
    return Image.fromarray(result)


def _to_srgb(image: Image.Image, profile: bytes | None, name: str) -> Image.Image:
    """Convert by the picture's colour profile; one that hardly changes sRGB is not applied."""
    if profile:
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            target = ImageCms.createProfile("sRGB")
            if image.mode != "RGB" or not _is_srgb(source, target):
                return ImageCms.profileToProfile(image, source, target, outputMode="RGB")
        except (ImageCms.PyCMSError, OSError, ValueError) as error:
            logger.warning("%s: its colour profile is ignored, %s", name, error)
    return image.convert("RGB")


def _is_srgb(source, target) -> bool:
    levels = np.linspace(0, 255, 9).astype(np.uint8)
    cube = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(27, 27, 3)
    seen = ImageCms.profileToProfile(Image.fromarray(cube), source, target)
    return int(np.abs(np.asarray(seen).astype(int) - cube).max()) <= 2
