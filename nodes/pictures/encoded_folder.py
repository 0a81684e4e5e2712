"""A folder of pictures, encoded: find, choose sizes, decode, encode what is not known yet."""

import hashlib
import logging
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ...sara_core.pictures.captions import Problem
from ...sara_core.pictures.encoding_cache import EncodingCache, content_key
from ...sara_core.pictures.picture_folder import find_pictures
from .. import host
from .folder_plan import (
    CACHE_VERSION,
    EncodedFolder,
    FolderOptions,
    Variant,
    look_at,
    plan_windows,
    settle_captions,
)
from .picture_files import Picture, read_file, read_picture

logger = logging.getLogger("comfyui-sara")

EMBEDDING = "embedding:"
NOT_FINITE = (
    "the VAE makes NaN or infinity of it; start ComfyUI with --fp32-vae or --bf16-vae, or use a VAE that "
    "is fixed for fp16"
)
THUMBNAIL = 128


def encode_folder(
    folder: Path, vae, clip, options: FolderOptions, cache: EncodingCache, node_id: str | None
) -> EncodedFolder:
    """Encode the pictures and captions of a folder.

    Args:
        folder: An existing folder.
        vae: Encodes the pictures.
        clip: Encodes the captions.
        options: What to make of them.
        cache: Keeps encodings between runs.
        node_id: Node that shows the progress.

    Raises:
        ValueError: No picture in it can be used, or one cannot and `options.refuse` is set.
    """
    files, problems = find_pictures(folder, options.recurse)
    result = EncodedFolder(problems=problems)
    looks = look_at(files, result)
    facts = host.vae_facts(vae)
    plan_windows(looks, options, facts, result)
    pictures_cache = cache if facts is not None else cache.off()
    missing = [v for v in result.variants if not _look_up(v, pictures_cache, result)]
    result.read = len(result.variants) - len(missing)
    texts = settle_captions(list(looks), options, result)
    progress = host.Progress(len(missing) + len(texts), node_id)
    for done, (variant, *parts) in enumerate(_decoded(missing, options, result.problems), 1):
        entry = _encode(*parts, vae)
        if entry["latent"].isfinite().all():
            result.encodings[variant.key] = entry
            pictures_cache.put(variant.key, entry)
        else:
            result.problems.append(Problem(variant.file.name, NOT_FINITE))
        progress.update(done)  # a Cancel surfaces here, when what is encoded is kept
    refused = [problem for problem in result.problems if not problem.is_note]
    if options.refuse and refused:
        raise ValueError(f"{folder.name} has files that are not used:\n{_list(refused)}")
    result.variants = [v for v in result.variants if v.key in result.encodings]
    if not result.variants:
        raise ValueError(
            f"{folder.name} has no picture that can be used"
            + (f":\n{_list(result.problems)}" if result.problems else "; put pictures into it")
        )
    facts = host.clip_facts(clip)
    captions_cache = cache if facts is not None else cache.off()
    for number, text in enumerate(texts):
        result.captions[text] = _encode_caption(text, clip, facts, captions_cache, options.emphasis)
        progress.update(len(missing) + number + 1)
    return result


def _list(problems: list[Problem]) -> str:
    return "\n".join(f"  {problem}" for problem in problems)


def _look_up(variant: Variant, cache: EncodingCache, result: EncodedFolder) -> bool:
    host.check_cancelled()
    if variant.key not in result.encodings:  # the same picture may be there twice
        entry = cache.get(variant.key)
        if entry is not None:
            result.encodings[variant.key] = entry
    return variant.key in result.encodings


def _decoded(
    variants: list[Variant], options: FolderOptions, problems: list[Problem]
) -> Iterator[tuple[Variant, Image.Image, Image.Image | None]]:
    """Yield windows at their training size, holding one decoded picture at a time."""
    for (file, digest), windows in groupby(variants, key=lambda v: (v.file, v.digest)):
        try:
            data = read_file(file.path)
            if hashlib.sha256(data).hexdigest() != digest:
                raise ValueError("it has changed while the folder was read; run the node again")
            picture = read_picture(data, options.background, file.name)
            parts = [(variant, *_cut(picture, variant)) for variant in windows]
        except (OSError, ValueError) as error:
            problems.append(Problem(file.name, str(error)))
            continue
        yield from parts


def _cut(picture: Picture, variant: Variant) -> list[Image.Image | None]:
    parts = [
        part and part.resize(variant.size, Image.Resampling.LANCZOS, variant.window)
        for part in (picture.colour, picture.opacity)
    ]
    if variant.mirrored:
        parts = [part and part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for part in parts]
    return parts


def _encode(colour: Image.Image, opacity: Image.Image | None, vae) -> dict:
    """Encode one window; by itself, so that its bits do not depend on what else is encoded."""
    pixels = torch.from_numpy(np.asarray(colour, dtype=np.float32) / 255)
    (latent,) = host.encode_pixels(vae, pixels[None])
    height, width = latent.shape[-2:]
    mask = None
    if opacity is not None:
        small = opacity.resize((width, height), Image.Resampling.BOX)
        mask = torch.from_numpy(np.asarray(small, dtype=np.float32) / 255)
    colour.thumbnail((THUMBNAIL, THUMBNAIL))
    return {
        "latent": latent.clone(),
        "mask": mask,
        "thumbnail": torch.from_numpy(np.array(colour)),
    }


def _encode_caption(
    text: str, clip, facts: list | None, cache: EncodingCache, emphasis: bool
) -> list:
    if EMBEDDING in text:  # a file's content takes its place
        cache = cache.off()
    key = content_key(version=CACHE_VERSION, caption=text, clip=facts, emphasis=emphasis)
    entry = cache.get(key)
    if entry is not None:
        return entry["conditioning"]
    conditioning = host.encode_text(clip, text, emphasis)
    try:
        cache.put(key, {"conditioning": conditioning})
    except TypeError as error:  # a text encoder that adds more than tensors and plain values
        logger.info("SaRA Image Folder: captions are not cached, %s", error)
    return conditioning


def mask_of(encoding: dict, use_alpha: bool) -> Tensor:
    """Return what counts in the loss, `(1, h, w)` at the latent's resolution."""
    mask, latent = encoding["mask"], encoding["latent"]
    if use_alpha and mask is not None:
        return mask[None]
    return torch.ones(1, *latent.shape[-2:])
