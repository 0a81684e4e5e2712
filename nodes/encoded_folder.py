"""A folder of pictures, encoded: find, choose sizes, decode, encode what is not known yet."""

import hashlib
import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageColor
from torch import Tensor

from ..sara_core.buckets import SizeRule, choose_sizes, crop_windows
from ..sara_core.encoding_cache import EncodingCache, content_key
from ..sara_core.picture_folder import PictureFile, Problem, find_pictures, with_trigger
from . import host
from .pictures import Picture, picture_size, read_file, read_picture

logger = logging.getLogger("comfyui-sara")

CACHE_VERSION = 1
EMBEDDING = "embedding:"
THUMBNAIL = 128


@dataclass(frozen=True)
class FolderOptions:
    """What is made of a folder.

    Args:
        size: Size in pixels, buckets, cropping.
        crops: Windows taken of each picture.
        flip: Add each window mirrored.
        background: Colour under transparent areas.
        use_alpha: Leave transparent areas out of the loss.
        trigger: Put before every caption.
        default_caption: Of pictures without one.
        repeats: Times every picture comes, beside what its folder says.
        refuse: Whether a file that cannot be used is an error.
        seed: Of random crops.
    """

    size: SizeRule
    crops: int = 1
    flip: bool = False
    background: str = "white"
    use_alpha: bool = False
    trigger: str = ""
    default_caption: str = ""
    repeats: int = 1
    refuse: bool = False
    seed: int = 0

    def __post_init__(self):
        try:
            ImageColor.getrgb(self.background)
        except ValueError as error:
            raise ValueError(
                f"the background {self.background!r} is no colour; write one like white or #ffffff"
            ) from error


@dataclass(frozen=True)
class Variant:
    """One window of one picture at its training size.

    Args:
        file: The picture.
        digest: SHA-256 of the file's content.
        size: Width and height it is resized to.
        window: Left, top, right and bottom in the picture.
        mirrored: Exchange left and right.
        key: Of the encoding.
    """

    file: PictureFile
    digest: str
    size: tuple[int, int]
    window: tuple[float, float, float, float]
    mirrored: bool
    key: str


@dataclass
class EncodedFolder:
    """What training needs of a folder, and what there is to tell about it.

    Args:
        variants: One per entry before repeats.
        encodings: Latent, mask and thumbnail of each, by key.
        captions: CONDITIONING by text, the empty caption included.
        texts: Caption of each file by name, trigger included.
        problems: Files that are left out or incomplete.
        missing: Names of pictures without a caption of their own.
        read: Number of encodings that were in the cache.
        reduced: Names of pictures too small for the full size.
    """

    variants: list[Variant] = field(default_factory=list)
    encodings: dict[str, dict] = field(default_factory=dict)
    captions: dict[str, list] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    reduced: list[str] = field(default_factory=list)
    read: int = 0

    def repeated(self, times: int) -> list[Variant]:
        """Return the entries of an epoch: each variant as often as it comes."""
        return [v for v in self.variants for _ in range(v.file.repeats * times)]


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
    files, problems = find_pictures(folder)
    result = EncodedFolder(problems=problems)
    looks = _look_at(files, result)
    facts = host.vae_facts(vae)
    _plan(looks, options, facts, result)
    pictures_cache = cache if facts is not None else cache.off()
    missing = [v for v in result.variants if not _look_up(v, pictures_cache, result)]
    result.read = len(result.variants) - len(missing)
    texts = _texts(list(looks), options, result)
    progress = host.Progress(len(missing) + len(texts), node_id)
    for done, (variant, *parts) in enumerate(_decoded(missing, options, result.problems), 1):
        entry = result.encodings[variant.key] = _encode(*parts, vae)
        pictures_cache.put(variant.key, entry)
        progress.update(done)
    if options.refuse and result.problems:
        raise ValueError(f"{folder.name} has files that cannot be used:\n{_list(result.problems)}")
    result.variants = [v for v in result.variants if v.key in result.encodings]
    if not result.variants:
        raise ValueError(
            f"{folder.name} has no picture that can be used"
            + (f":\n{_list(result.problems)}" if result.problems else "; put pictures into it")
        )
    facts = host.clip_facts(clip)
    captions_cache = cache if facts is not None else cache.off()
    for number, text in enumerate(texts):
        result.captions[text] = _encode_caption(text, clip, facts, captions_cache)
        progress.update(len(missing) + number + 1)
    return result


def _list(problems: list[Problem]) -> str:
    return "\n".join(f"  {problem}" for problem in problems)


def _look_at(files: list[PictureFile], result: EncodedFolder) -> dict[PictureFile, tuple]:
    """Return size and digest of every file that is a picture."""
    looks = {}
    for file in files:
        host.check_cancelled()
        try:
            data = read_file(file.path)
            looks[file] = picture_size(data, file.name), hashlib.sha256(data).hexdigest()
        except (OSError, ValueError) as error:
            result.problems.append(Problem(file.name, str(error)))
    return looks


def _plan(looks: dict, options: FolderOptions, vae_facts: list | None, result) -> None:
    """List the windows of every picture, and what each one's encoding depends on."""
    rule = options.size
    chosen = choose_sizes([own for own, _ in looks.values()], rule)
    for (file, (own, digest)), size in zip(looks.items(), chosen, strict=True):
        if size is None:
            result.problems.append(
                Problem(file.name, f"it is too small, {own[0]}x{own[1]} pixels, for {rule.side}")
            )
            continue
        if size[0] * size[1] < 0.6 * rule.side**2:
            result.reduced.append(file.name)
        seed = options.seed ^ int(digest[:12], 16)
        for window in crop_windows(own, size, rule.crop, options.crops, seed):
            for mirrored in (False, True) if options.flip else (False,):
                key = content_key(
                    version=CACHE_VERSION, picture=digest, vae=vae_facts, size=size,
                    window=[round(edge, 3) for edge in window], mirrored=mirrored,
                    background=options.background,
                )  # fmt: skip
                result.variants.append(Variant(file, digest, size, window, mirrored, key))


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


def _texts(files: list[PictureFile], options: FolderOptions, result: EncodedFolder) -> list[str]:
    """Settle the caption of each picture; returns the different ones, the empty one first."""
    for file in files:
        if file.caption is None:
            result.missing.append(file.name)
        caption = options.default_caption.strip() if file.caption is None else file.caption
        result.texts[file.name] = with_trigger(caption, options.trigger)
    return list(dict.fromkeys(["", *result.texts.values()]))


def _encode_caption(text: str, clip, facts: list | None, cache: EncodingCache) -> list:
    if EMBEDDING in text:  # a file's content takes its place
        cache = cache.off()
    key = content_key(version=CACHE_VERSION, caption=text, clip=facts)
    entry = cache.get(key)
    if entry is not None:
        return entry["conditioning"]
    conditioning = host.encode_text(clip, text)
    try:
        cache.put(key, {"conditioning": conditioning})
    except TypeError as error:  # a text encoder that adds more than tensors and plain values
        logger.info("SaRA Image Folder: captions are not cached, %s", error)
    return conditioning


def count_sizes(variants: list[Variant]) -> Counter:
    """Count the entries of each size, the most frequent first."""
    return Counter(dict(Counter(v.size for v in variants).most_common()))


def mask_of(encoding: dict, use_alpha: bool) -> Tensor:
    """Return what counts in the loss, `(1, h, w)` at the latent's resolution."""
    mask, latent = encoding["mask"], encoding["latent"]
    if use_alpha and mask is not None:
        return mask[None]
    return torch.ones(1, *latent.shape[-2:])
