"""Small pictures for the card of SaRA Image Folder, made apart from what the server is at."""

import io
import logging
from collections.abc import Mapping

from PIL import Image, ImageOps

from .. import host
from .picture_files import eight_bit, readable_formats

PATH = "/sara/thumbnail"
SIDE, QUALITY = 144, 60

logger = logging.getLogger("comfyui-sara")


def thumbnail(query: Mapping[str, str]) -> bytes | None:
    """Return the picture `name` of the folder `folder`, upright and small, as WebP.

    Returns:
        None if there is no such picture in ComfyUI's folders, or it cannot be read.
    """
    path = host.picture_file(query.get("folder", ""), query.get("name", ""))
    if path is None:
        return None
    out = io.BytesIO()
    try:
        with Image.open(path, formats=readable_formats()) as image:
            image.draft("RGB", (SIDE, SIDE))  # a JPEG is decoded no larger than needed
            small = ImageOps.exif_transpose(image)
            is_clear = small.has_transparency_data
            small = small.convert("RGBA") if is_clear else eight_bit(small).convert("RGB")
            small.thumbnail((SIDE, SIDE))
            small.save(out, "WEBP", quality=QUALITY)
    except (
        Exception
    ) as error:  # decoders raise anything; what is wrong with it is said when it is read
        logger.debug("no thumbnail of %s: %s", path, error)
        return None
    return out.getvalue()
