"""Which frames of videos are learned, and what is encoded of them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import groupby

import numpy as np
import torch
from PIL import Image

from ...sara_core.pictures.captions import Problem
from ...sara_core.pictures.encoding_cache import content_key
from ...sara_core.pictures.picture_folder import PictureFile
from ...sara_core.pictures.video_folder import find_videos
from .. import host
from .encoded_folder import THUMBNAIL, Medium, cut
from .folder_plan import EncodedFolder, FolderOptions, Variant, plan_windows
from .picture_files import Picture
from .video_files import VideoFacts, video_digest, video_facts, video_frames

# Parts of the frames asked for, that videos too short for all of them are trained at.
SHORTER = (1, 2, 4)
# By which a frame may come late: a share of the time between two, and seconds.
SLACK, LEAST_SLACK = 0.25, 1e-3
VERSION = 1  # of what "frame n" means, for encodings that are kept
FRAMES_OF_FOLDERS = 16.0  # a second, where nothing says how many


@dataclass(frozen=True)
class ClipOptions(FolderOptions):
    """What is made of a folder of videos.

    Args:
        frames: Numbers of frames that the VAE takes, the longest first.
        fps: Frames a second; 0 takes each video's own.
        clips: Stretches of time taken of each video.
    """

    frames: tuple[int, ...] = (1,)
    fps: float = 0.0
    clips: int = 1


@dataclass(frozen=True)
class Clip(Variant):
    """A stretch of a video, of one window.

    Args:
        frames: Numbers of the frames in it, in order; one may come twice where there are too few.
    """

    frames: tuple[int, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        """Width, height and number of frames."""
        return *self.size, len(self.frames)


def lengths(vae, frames: int) -> tuple[int, ...]:
    """Return the numbers of frames that videos are trained at, the longest first.

    Raises:
        ValueError: The VAE takes pictures only, or not so few frames.
    """
    found = [host.frames_taken(vae, max(1, frames // part)) for part in SHORTER]
    taken = tuple(dict.fromkeys(n for n in found if n > 1 or frames == 1))
    if not taken:
        least = next(n for n in range(frames, 1000) if host.frames_taken(vae, n) > 1)
        raise ValueError(
            f"frames is {frames}, but this VAE encodes single pictures or at least {least} frames; set it to "
            f"{least} or more, or to 1"
        )
    return taken


def frames_of(times: Sequence[float], options: ClipOptions) -> list[tuple[int, ...]]:
    """Choose the frames of each clip of a video: at every moment the one that is shown then.

    Args:
        times: When each frame is shown, in seconds from the first.
        options: How many frames, how fast, and how many clips.

    Returns:
        Clips of the greatest length that fits, spread evenly over the video, a single one in its middle; none
        if the video is too short for any.
    """
    shown = np.arange(len(times))
    if options.fps and times[-1]:
        slack = max(LEAST_SLACK, SLACK * float(np.median(np.diff(times))))
        moments = np.arange(int(times[-1] * options.fps + SLACK) + 1) / options.fps
        shown = np.searchsorted(np.asarray(times), moments + slack, side="right") - 1
    length = next((n for n in options.frames if n <= len(shown)), None)
    if length is None:
        return []
    room = len(shown) - length
    starts = [room // 2]
    if options.clips > 1:
        starts = [round(room * i / (options.clips - 1)) for i in range(options.clips)]
    found = [tuple(shown[start : start + length].tolist()) for start in starts]
    return list(dict.fromkeys(found))


def look_at_videos(files: list[PictureFile], result: EncodedFolder) -> dict[PictureFile, tuple]:
    """Return what is known of every video that can be read, and the digest of its content."""
    looks = {}
    for file in files:
        host.check_cancelled()
        try:
            looks[file] = video_facts(file.path), video_digest(file.path)
        except (OSError, ValueError) as error:
            result.problems.append(Problem(file.name, str(error)))
    return looks


def plan_clips(looks: dict, options: ClipOptions, vae_facts: list | None, result) -> None:
    """List the clips of every video."""
    chosen = {}
    for file, (facts, _) in looks.items():
        facts = facts.at_rate(options.fps or FRAMES_OF_FOLDERS)
        chosen[file] = frames_of(facts.times, options)
        if not chosen[file]:
            result.problems.append(Problem(file.name, _too_short(facts, options)))
    pictures = {
        file: (facts.size, digest) for file, (facts, digest) in looks.items() if chosen[file]
    }
    plan_windows(pictures, options, vae_facts, result)
    windows, result.variants = result.variants, []
    for window in windows:
        same = {field.name: getattr(window, field.name) for field in fields(Variant)}
        for frames in chosen[window.file]:
            key = content_key(version=VERSION, window=window.key, frames=frames)
            result.variants.append(Clip(**{**same, "key": key}, frames=frames))


def _too_short(facts: VideoFacts, options: ClipOptions) -> str:
    rate = f" at {options.fps:g} frames a second" if options.fps else ""
    return (
        f"it is too short: {facts.count} frames in {facts.times[-1]:.2f} s, but at least {options.frames[-1]} are "
        f"needed{rate}"
    )


def encoded_clips(
    variants: list[Clip], options: ClipOptions, vae, problems: list[Problem]
) -> Iterator[tuple[Clip, dict]]:
    """Yield clips with their latent and a small picture, each as soon as its last frame is decoded."""
    for (file, digest), clips in groupby(variants, key=lambda clip: (clip.file, clip.digest)):
        try:
            if video_digest(file.path) != digest:
                raise ValueError("it has changed while the folder was read; run the node again")
            for clip, frames in _gathered(list(clips), options.background):
                yield clip, _encode(clip, frames, vae)
        except (OSError, ValueError) as error:
            problems.append(Problem(file.name, str(error)))


def _gathered(clips: list[Clip], background: str) -> Iterator[tuple[Clip, dict[int, Image.Image]]]:
    """Yield the clips of one video with their frames, cut as they are decoded."""
    held: dict[int, dict[int, Image.Image]] = {i: {} for i in range(len(clips))}
    numbers = {number for clip in clips for number in clip.frames}
    for number, frame in video_frames(clips[0].file.path, numbers, background):
        host.check_cancelled()
        for i in [i for i in held if number in clips[i].frames]:
            clip = clips[i]
            colour, _ = cut(Picture(frame, None), clip.size, clip.window, clip.mirrored)
            held[i][number] = colour
            if number == max(clip.frames):
                yield clip, held.pop(i)


def _encode(clip: Clip, frames: dict[int, Image.Image], vae) -> dict:
    pixels = np.stack([np.asarray(frames[number], dtype=np.float32) for number in clip.frames])
    (latent,) = host.encode_pixels(vae, torch.from_numpy(pixels / 255))
    middle = frames[clip.frames[len(clip.frames) // 2]]
    middle.thumbnail((THUMBNAIL, THUMBNAIL))
    return {
        "latent": latent.clone(),
        "mask": None,
        "thumbnail": torch.from_numpy(np.array(middle)),
    }


VIDEOS = Medium("videos", find_videos, look_at_videos, plan_clips, encoded_clips)
