"""A folder of pictures, encoded: find, choose sizes, decode, encode what is not known yet."""

import hashlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
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
from ..training.ending import ending_together
from .division import divide
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


@dataclass(frozen=True)
class Medium:
    """What is in a folder, and how entries are made of it.

    Args:
        word: For what is in it.
        find: Lists the files, as `find_pictures`.
        look_at: Returns what is to be known of each file before it is decoded, as `look_at`.
        plan: Lists the entries, as `plan_windows`.
        encoded: Yields entries with what is kept of each, as `_encoded_pictures`.
    """

    word: str
    find: Callable
    look_at: Callable
    plan: Callable
    encoded: Callable


def refuse_missing(vae, clip) -> None:
    """Raise if a loader had no VAE or CLIP to put out.

    Raises:
        ValueError: Naming the one that is missing.
    """
    for socket, given in (("vae", vae), ("clip", clip)):
        if given is None:
            raise ValueError(
                f"{socket} is connected to a checkpoint without {socket.upper()}; connect a Load "
                f"{socket.upper()} node with the one that the model was trained with"
            )


def encode_folder(
    folder: Path,
    vae,
    clip,
    options: FolderOptions,
    cache: EncodingCache,
    node_id: str | None,
    medium: Medium | None = None,
) -> EncodedFolder:
    """Encode the pictures and captions of a folder.

    Args:
        folder: An existing folder.
        vae: Encodes the pictures.
        clip: Encodes the captions.
        options: What to make of them.
        cache: Keeps encodings between runs.
        node_id: Node that shows the progress.
        medium: What is in it instead of pictures.

    Raises:
        ValueError: No picture in it can be used, or one cannot and `options.refuse` is set.
    """
    medium = medium or PICTURES
    files, problems = medium.find(folder, options.recurse)
    result = EncodedFolder(problems=problems)
    looks = medium.look_at(files, result)
    facts = host.vae_facts(vae)
    medium.plan(looks, options, facts, result)
    texts = settle_captions(list(looks), options, result)
    pictures_cache = cache if facts is not None else cache.off()
    progress = host.Progress(len(texts), node_id)
    with ending_together():
        _encode_pictures(medium, vae, options, pictures_cache, result, progress)
    refused = [problem for problem in result.problems if not problem.is_note]
    if options.refuse and refused:
        raise ValueError(f"{folder.name} has files that are not used:\n{_list(refused)}")
    result.variants = [v for v in result.variants if v.key in result.encodings]
    if not result.variants:
        raise ValueError(
            f"{folder.name} has nothing that can be used"
            + (
                f":\n{_list(result.problems)}"
                if result.problems
                else f"; put {medium.word} into it"
            )
        )
    with ending_together():
        _encode_captions(texts, clip, options, cache, result, progress)
    return result


def _list(problems: list[Problem]) -> str:
    return "\n".join(f"  {problem}" for problem in problems)


def _encode_pictures(
    medium: Medium, vae, options, cache: EncodingCache, result: EncodedFolder, progress
) -> None:
    """Encode what is not in the cache; of several processes each does its share."""
    processes, encodings = host.processes(), result.encodings
    missing = [v for v in result.variants if not _look_up(v, cache, result)]
    result.read = len(result.variants) - len(missing)
    problems: list[Problem] = []

    def make(keys: list[str]) -> dict[str, dict]:
        asked = set(keys)
        mine = [v for v in missing if v.key in asked]
        progress.add(len(mine))
        for variant, entry in medium.encoded(mine, options, vae, problems):
            if entry["latent"].isfinite().all():
                encodings[variant.key] = entry
                cache.put(variant.key, entry)
            else:
                problems.append(Problem(variant.file.name, NOT_FINITE))
            progress.step()  # a Cancel surfaces here, when what is encoded is kept
        return {key: encodings[key] for key in keys if key in encodings}

    made = divide(processes, [v.key for v in result.variants], set(encodings), make)
    for key in made.keys() - encodings.keys():
        cache.put(key, made[key])
    encodings |= made
    for found in processes.gather(lambda: problems):
        result.problems += found


def _look_up(variant: Variant, cache: EncodingCache, result: EncodedFolder) -> bool:
    host.check_cancelled()
    if variant.key not in result.encodings:  # the same picture may be there twice
        entry = cache.get(variant.key)
        if entry is not None:
            result.encodings[variant.key] = entry
    return variant.key in result.encodings


def _encoded_pictures(
    variants: list[Variant], options: FolderOptions, vae, problems: list[Problem]
) -> Iterator[tuple[Variant, dict]]:
    for variant, *parts in _decoded(variants, options, problems):
        yield variant, _encode(*parts, vae)


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
            parts = [
                (variant, *cut(picture, variant.size, variant.window, variant.mirrored))
                for variant in windows
            ]
        except (OSError, ValueError) as error:
            problems.append(Problem(file.name, str(error)))
            continue
        yield from parts


def cut(
    picture: Picture,
    size: tuple[int, int],
    window: tuple[float, float, float, float],
    mirrored: bool,
) -> list[Image.Image | None]:
    """Return colour and opacity of a window of a picture, at a size."""
    parts = [
        part and part.resize(size, Image.Resampling.LANCZOS, window)
        for part in (picture.colour, picture.opacity)
    ]
    if mirrored:
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


PICTURES = Medium("pictures", find_pictures, look_at, plan_windows, _encoded_pictures)


def _encode_captions(texts, clip, options, cache: EncodingCache, result, progress) -> None:
    """Encode the captions that are not in the cache; of several processes each does its share."""
    facts = host.clip_facts(clip)

    def key(text: str) -> str:
        return content_key(
            version=CACHE_VERSION, caption=text, clip=facts, emphasis=options.emphasis
        )

    def kept(text: str) -> EncodingCache:  # not where a file's content takes the text's place
        return cache.off() if facts is None or EMBEDDING in text else cache

    keys = {key(text): text for text in texts}
    entries = {own: kept(text).get(own) for own, text in keys.items()}
    known = {own: entry for own, entry in entries.items() if entry is not None}

    def make(asked: list[str]) -> dict[str, dict]:
        made = {}
        for own in asked:
            entry = known.get(own)
            if entry is None:
                entry = {"conditioning": host.encode_text(clip, keys[own], options.emphasis)}
                _put_caption(kept(keys[own]), own, entry)
            made[own] = entry
            progress.step()
        return made

    entries |= divide(host.processes(), list(keys), set(known), make)
    progress.update(progress.bar.total)
    result.captions |= {text: entries[own]["conditioning"] for own, text in keys.items()}


def _put_caption(cache: EncodingCache, key: str, entry: dict) -> None:
    try:
        cache.put(key, entry)
    except TypeError as error:  # a text encoder that adds more than tensors and plain values
        logger.info("SaRA Image Folder: captions are not cached, %s", error)


def mask_of(encoding: dict, use_alpha: bool) -> Tensor:
    """Return what counts in the loss, `(1, h, w)` at the latent's resolution."""
    mask, latent = encoding["mask"], encoding["latent"]
    if use_alpha and mask is not None:
        return mask[None]
    return torch.ones(1, *latent.shape[-2:])
