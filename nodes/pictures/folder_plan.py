"""What is to be made of a folder of pictures: which windows at which size, which captions."""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field

from PIL import ImageColor

from ...sara_core.pictures.buckets import SizeRule, choose_sizes, crop_windows
from ...sara_core.pictures.caption_variants import VariantRule
from ...sara_core.pictures.captions import Problem, with_trigger
from ...sara_core.pictures.encoding_cache import content_key
from ...sara_core.pictures.picture_folder import PictureFile
from .. import host
from .picture_files import picture_size, read_file

CACHE_VERSION = 1
FEW = 3  # files that are named one by one
WHOLE = 0.6  # share of a size's area from which on a picture is not at a smaller one


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
        emphasis: Whether parentheses in captions are ComfyUI's emphasis.
        recurse: Take the pictures of all folders in it.
        seed: Of random crops, and of captions.
        variants: Which captions a picture is learned with.
        more_sizes: Further sizes that every picture is trained at.
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
    emphasis: bool = False
    recurse: bool = False
    seed: int = 0
    variants: VariantRule = VariantRule()
    more_sizes: tuple[SizeRule, ...] = ()

    def __post_init__(self):
        try:
            ImageColor.getrgb(self.background)
        except ValueError as error:
            raise ValueError(
                f"the background {self.background!r} is no colour; write one like white or #ffffff"
            ) from error


@dataclass(frozen=True)
class Place:
    """Which part of a picture is learned, to cut others alike.

    Args:
        size: Width and height it is resized to.
        share: Left, top, right and bottom, as shares of the picture's sides.
        aspect: Of the picture, width to height.
        mirrored: Exchange left and right.
    """

    size: tuple[int, int]
    share: tuple[float, float, float, float]
    aspect: float
    mirrored: bool


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
        picture: Width and height of the whole picture.
    """

    file: PictureFile
    digest: str
    size: tuple[int, int]
    window: tuple[float, float, float, float]
    mirrored: bool
    key: str
    picture: tuple[int, int]

    @property
    def shape(self) -> tuple[int, ...]:
        """Width and height, and of a clip its number of frames."""
        return self.size

    @property
    def place(self) -> Place:
        """What of the picture this is."""
        (width, height), (left, top, right, bottom) = self.picture, self.window
        share = (left / width, top / height, right / width, bottom / height)
        return Place(self.size, share, width / height, self.mirrored)


@dataclass
class EncodedFolder:
    """What training needs of a folder, and what there is to tell about it.

    Args:
        variants: One per entry before repeats.
        encodings: Latent, mask and thumbnail of each, by key.
        captions: CONDITIONING by text, the empty caption included.
        texts: Caption of each file by name, trigger included.
        drawn: Captions to draw from when it is learned, of files that have several.
        problems: Files that are left out or incomplete.
        missing: Names of pictures without a caption of their own.
        read: Number of encodings that were in the cache.
        reduced: Names of pictures too small for the full size.
    """

    variants: list[Variant] = field(default_factory=list)
    encodings: dict[str, dict] = field(default_factory=dict)
    captions: dict[str, list] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    drawn: dict[str, list[str]] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    reduced: list[str] = field(default_factory=list)
    read: int = 0

    def repeated(self, times: int) -> list[Variant]:
        """Return the entries of an epoch: each variant as often as it comes."""
        return [v for v in self.variants for _ in range(v.file.repeats * times)]


def look_at(files: list[PictureFile], result: EncodedFolder) -> dict[PictureFile, tuple]:
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


def plan_windows(looks: dict, options: FolderOptions, vae_facts: list | None, result) -> None:
    """List the windows of every picture at every size, and what each one's encoding depends on."""
    rules = (options.size, *options.more_sizes)
    chosen = [choose_sizes([own for own, _ in looks.values()], rule) for rule in rules]
    of_each = dict(zip(looks, zip(*chosen, strict=True), strict=True))
    small = {file: looks[file][0] for file, sizes in of_each.items() if not any(sizes)}
    result.problems += too_small(small, len(looks), min(rules, key=lambda rule: rule.side))
    for file, sizes in of_each.items():
        found = [(rule, size) for rule, size in zip(rules, sizes, strict=True) if size]
        whole = [(rule, size) for rule, size in found if math.prod(size) >= WHOLE * rule.side**2]
        if found and not whole:
            result.reduced.append(file.name)
            whole = [max(found, key=lambda pair: math.prod(pair[1]))]
        for rule, size in whole:
            result.variants += _windows(file, looks[file], size, rule, options, vae_facts)


def _windows(
    file, look, size, rule: SizeRule, options: FolderOptions, vae_facts
) -> Iterator[Variant]:
    own, digest = look
    seed = options.seed ^ int(digest[:12], 16)
    for window in crop_windows(own, size, rule.crop, options.crops, seed):
        for mirrored in (False, True) if options.flip else (False,):
            key = content_key(
                version=CACHE_VERSION, picture=digest, vae=vae_facts, size=size,
                window=[round(edge, 3) for edge in window], mirrored=mirrored,
                background=options.background,
            )  # fmt: skip
            yield Variant(file, digest, size, window, mirrored, key, own)


def too_small(small: dict, count: int, rule: SizeRule) -> list[Problem]:
    """Say which pictures are too small, or what size would do if they are most of them."""
    if len(small) <= max(FEW, count // 2):
        return [
            Problem(file.name, f"it is too small, {own[0]}x{own[1]} pixels, for {rule.side}")
            for file, own in small.items()
        ]
    sides = sorted(math.isqrt(own[0] * own[1]) for own in small.values())
    fitting = max(
        rule.unit, int(sides[len(sides) // 2] * min(1, rule.max_upscale)) // rule.unit * rule.unit
    )
    first, own = next(iter(small.items()))
    reason = (
        f"and {len(small) - 1} more of {count} pictures are too small for a size of {rule.side}, this one "
        f"has {own[0]}x{own[1]} pixels; a size of {fitting} would suit most of them"
    )
    return [Problem(first.name, reason)]


def settle_captions(
    files: list[PictureFile], options: FolderOptions, result: EncodedFolder
) -> list[str]:
    """Settle the captions of each picture; returns the different ones, the empty one first."""
    for file in files:
        if not file.lines:
            result.missing.append(file.name)
        lines = file.lines or (options.default_caption.strip(),)
        lines = lines if options.variants.lines else (" ".join(lines),)
        written, drawn = options.variants([with_trigger(line, options.trigger) for line in lines])
        result.texts[file.name] = written
        if drawn:
            result.drawn[file.name] = drawn
    several = [text for drawn in result.drawn.values() for text in drawn]
    return list(dict.fromkeys(["", *result.texts.values(), *several]))
