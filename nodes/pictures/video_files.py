"""Read video files with PyAV, which ComfyUI comes with, and folders of frames with Pillow."""

import contextlib
import hashlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from ...sara_core.pictures.video_folder import frames_in
from .picture_files import SMALLEST_SIDE, picture_size, read_file, read_picture

CHUNK = 1 << 24


@dataclass(frozen=True)
class VideoFacts:
    """What is known of a video before its frames are decoded.

    Args:
        size: Width and height as it is seen.
        times: When each frame is shown, in seconds from the first; of a folder of frames, none.
        count: Number of frames.
    """

    size: tuple[int, int]
    times: tuple[float, ...]
    count: int

    def at_rate(self, rate: float) -> "VideoFacts":
        """Return the facts with times; frames of a folder come at a rate, in frames per second."""
        times = self.times or tuple(number / rate for number in range(self.count))
        return VideoFacts(self.size, times, self.count)


def video_facts(path: Path) -> VideoFacts:
    """Look into a video.

    Raises:
        ValueError: It cannot be read; the message says why.
    """
    if path.is_dir():
        frames = frames_in(path)
        sizes = {picture_size(read_file(frame), frame.name) for frame in frames}
        if len(sizes) > 1:
            raise ValueError(f"its frames have {len(sizes)} different sizes")
        return VideoFacts(sizes.pop(), (), len(frames))
    with _opened(path) as (container, stream):
        marks = [packet.pts for packet in container.demux(stream) if packet.pts is not None]
        times = sorted(float(mark * stream.time_base) for mark in set(marks))
        container.seek(0)
        first = next(iter(container.decode(stream)), None)
        if first is None or len(times) < 1:
            raise ValueError("it holds no frame that can be decoded")
        height, width = _upright(first).shape[:2]
    if min(width, height) < SMALLEST_SIDE:
        raise ValueError(f"it is tiny, {width}x{height} pixels")
    return VideoFacts((width, height), tuple(time - times[0] for time in times), len(times))


def video_digest(path: Path) -> str:
    """Return the SHA-256 of a video's content, of all frames where it is a folder."""
    digest = hashlib.sha256()
    for file in frames_in(path) if path.is_dir() else [path]:
        with open(file, "rb") as stream:
            while chunk := stream.read(CHUNK):
                digest.update(chunk)
    return digest.hexdigest()


def video_frames(path: Path, numbers: Collection[int], background: str) -> dict[int, Image.Image]:
    """Decode some frames of a video, upright, in RGB.

    Args:
        path: A video file, or a folder of frames.
        numbers: Of the frames, in the order in which they are shown.
        background: Colour under transparent areas of frames in a folder.

    Raises:
        ValueError: One of them cannot be decoded.
    """
    if path.is_dir():
        files = frames_in(path)
        return {
            number: read_picture(read_file(files[number]), background, files[number].name).colour
            for number in sorted(set(numbers))
        }
    wanted, found = set(numbers), {}
    with _opened(path) as (container, stream):
        marks = sorted({p.pts for p in container.demux(stream) if p.pts is not None})
        places = {mark: number for number, mark in enumerate(marks)}
        container.seek(marks[min(wanted)], stream=stream, backward=True)
        for frame in container.decode(stream):
            number = places.get(frame.pts, -1)
            if number in wanted:
                found[number] = Image.fromarray(_upright(frame))
            if len(found) == len(wanted):
                break
    if missing := wanted - found.keys():
        raise ValueError(f"frame {min(missing) + 1} of {len(marks)} cannot be decoded")
    return found


def _upright(frame) -> np.ndarray:
    """Return a frame `(H, W, 3)` as it is seen; a phone says how it was held."""
    turns = round(getattr(frame, "rotation", 0) / 90) % 4
    return np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), turns))


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple]:
    """Open a video file and its first stream of pictures; what goes wrong inside says that it is damaged."""
    try:
        import av
    except ImportError as error:
        raise ValueError("reading videos needs the Python package av (pip install av)") from error
    try:
        container = av.open(str(path))
    except Exception as error:  # decoders raise anything
        raise ValueError(f"it is not a video that can be read ({error})") from error
    with container:
        if not container.streams.video:
            raise ValueError("it holds no pictures, only sound")
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        try:
            yield container, stream
        except av.error.FFmpegError as error:
            raise ValueError(f"it is damaged or cut off ({error})") from error
