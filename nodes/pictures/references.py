"""Pictures that belong to those of a training set: what an edit model is given, or what it fills in."""

import math
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from comfy_api.latest import io
from torch import Tensor

from ...sara_core.pictures.captions import folded
from ...sara_core.pictures.picture_folder import PictureFile, describe_files, find_pictures
from .. import host
from ..inputs import chosen, refuse_unchosen, searched_as
from ..training.examples import WINDOW, picture_labels, picture_values
from .encoded_folder import cut
from .folder_plan import Place
from .picture_files import read_file, read_picture

FITS = ("same window", "whole picture")
UNIT = 16  # of the sides of whole pictures
SAME_SHAPE = 0.02  # difference of aspects up to which a window is the same part of both pictures
MAX_NAMES = 10


def counterparts(names: list[str], folder: Path) -> dict[str, PictureFile]:
    """Find the picture of the same name in a folder, whatever its ending, for each of some names.

    Args:
        names: Below the folder they are from; one in a folder of its own there may lie directly in this one.
        folder: To look in, with all folders in it.

    Raises:
        ValueError: Some have none, or more than one.
    """
    files, _ = find_pictures(folder, recurse=True)
    exact = {file.name: file for file in files}
    by_stem: dict[str, list[PictureFile]] = {}
    for file in files:
        by_stem.setdefault(_stem(file.name), []).append(file)

    def find(name: str) -> PictureFile | None:
        stem = _stem(name)
        candidates = by_stem.get(stem) or by_stem.get(PurePosixPath(stem).name, [])
        if name not in exact and len(candidates) > 1:
            raise ValueError(
                f"{name} may belong to {' or '.join(file.name for file in candidates)} in {folder.name}; leave one "
                "of them there"
            )
        return exact.get(name) or next(iter(candidates), None)

    found = {name: find(name) for name in names}
    if missing := [name for name, file in found.items() if file is None]:
        raise ValueError(
            f"{len(missing)} of {len(found)} pictures have none of the same name in {folder.name}: "
            f"{', '.join(missing[:MAX_NAMES])}{'...' if len(missing) > MAX_NAMES else ''}. Put them there, or "
            "take these out of the training set"
        )
    return {name: file for name, file in found.items() if file is not None}


def _stem(name: str) -> str:
    return folded(PurePosixPath(name).with_suffix("").as_posix())


def reference_of(file: PictureFile, place: Place, fit: str, background: str) -> Tensor:
    """Return a picture as IMAGE `(1, H, W, 3)` in `[0, 1]`, cut as the one that is learned, or whole.

    Args:
        file: The picture.
        place: Which window of the other picture is learned, and at what size.
        fit: One of `FITS`.
        background: Colour under transparent areas.

    Raises:
        ValueError: It cannot be read, or has another shape than the other picture.
    """
    try:
        picture = read_picture(read_file(file.path), background, file.name)
    except (OSError, ValueError) as error:
        raise ValueError(f"{file.name}: {error}") from error
    width, height = picture.colour.size
    if fit == FITS[1]:
        size, window = _whole_size((width, height), place.size), (0, 0, width, height)
    else:
        if abs(math.log(width / height / place.aspect)) > SAME_SHAPE:
            raise ValueError(
                f"{file.name} is {width}x{height}, another shape than the picture that is learned, so they "
                f"cannot be cut alike; choose {FITS[1]!r} for fit, or give both the same shape"
            )
        left, top, right, bottom = place.share
        size, window = place.size, (left * width, top * height, right * width, bottom * height)
    colour, _ = cut(picture, size, window, place.mirrored)
    return torch.from_numpy(np.asarray(colour, dtype=np.float32) / 255)[None]


def _whole_size(own: tuple[int, int], other: tuple[int, int]) -> tuple[int, int]:
    """Return a picture's own shape at about the area of another one."""
    factor = math.sqrt(other[0] * other[1] / (own[0] * own[1]))
    width, height = (max(UNIT, round(side * factor / UNIT) * UNIT) for side in own)
    return width, height


class SaraReferencePictures(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SaraReferencePictures",
            display_name="SaRA Reference Pictures",
            category="SaRA",
            description="For each picture of a training set, puts out the one of the same name in another folder, "
            "cut alike: what an edit model is given, such as the picture before the edit, or a mask. Nodes such as "
            "ReferenceLatent turn them into conditioning.",
            is_input_list=True,
            hidden=[io.Hidden.unique_id],
            **searched_as("edit pairs", "control images", "kontext training", "before and after"),
            inputs=[
                io.Latent.Input(
                    "latents", tooltip="From SaRA Image Folder: the pictures to learn."
                ),
                io.Combo.Input(
                    "folder",
                    options=chosen("folder", list(host.picture_folders())),
                    tooltip="Folder with a picture of the same name for each, such as fox.jpg for fox.png. The "
                    "folder of the set itself puts out its own pictures. Press R to refresh.",
                ),
                io.Combo.Input(
                    "fit",
                    options=list(FITS),
                    default=FITS[0],
                    tooltip="same window cuts each as the picture that is learned was cut, mirrored too; whole "
                    "picture keeps all of it, in its own shape at about the same area, as for a person or thing to "
                    "be shown elsewhere.",
                ),
                io.String.Input(
                    "background", default="white", tooltip="Colour under transparent areas."
                ),
            ],
            outputs=[
                io.Image.Output(
                    display_name="images",
                    is_output_list=True,
                    tooltip="One per entry, in the order of the latents. They are held in main memory.",
                )
            ],
        )

    @classmethod
    def validate_inputs(cls, folder):
        return refuse_unchosen(
            folder[0], "put a folder of pictures into ComfyUI's input folder, and press R"
        )

    @classmethod
    def fingerprint_inputs(cls, folder, **_) -> list:
        path = host.picture_folders().get(folder[0])
        return describe_files(Path(path)) if path else []

    @classmethod
    def execute(cls, latents, folder, fit, background) -> io.NodeOutput:
        names, places = picture_labels(latents, "latent"), picture_values(latents, WINDOW)
        if None in places:
            raise ValueError(
                "the latents do not say which pictures they are of; connect those of SaRA Image Folder or SaRA "
                "Join Pictures"
            )
        files = counterparts(names, Path(host.picture_folder(folder[0])))
        progress = host.Progress(len(names), cls.hidden.unique_id)
        made: dict[tuple, Tensor] = {}  # repeats share theirs
        for name, place in zip(names, places, strict=True):
            if (name, place) not in made:
                made[name, place] = reference_of(files[name], place, fit[0], background[0])
            progress.step()
        return io.NodeOutput([made[which] for which in zip(names, places, strict=True)])
