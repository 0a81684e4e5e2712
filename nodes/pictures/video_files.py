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
# What is opened, whatever a file is called: none of the formats that name other files.
FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegts,mpegvideo,gif"
WITH_TIMES = ("mov", "matroska", "gif")  # formats that say when each frame is shown


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
        sizes = {_frame(frame, picture_size) for frame in frames_in(path)}
        if len(sizes) > 1:
            raise ValueError(f"its frames have {len(sizes)} different sizes")
        return VideoFacts(sizes.pop(), (), len(frames_in(path)))
    with _opened(path) as (container, stream):
        first = next(iter(container.decode(stream)), None)
        if first is None:
            raise ValueError("it holds no frame that can be decoded")
        size = _upright(first, stream).size
    if min(size) < SMALLEST_SIDE:
        raise ValueError(f"it is tiny, {size[0]}x{size[1]} pixels")
    with _opened(path) as (container, stream):
        times = sorted(_times(container, stream))
    return VideoFacts(size, tuple(time - times[0] for time in times), len(times))


def _times(container, stream) -> list[float]:
    """Return when each frame is shown, in seconds: from the file's index, or where it has none by decoding."""
    if any(name in container.format.name for name in WITH_TIMES):
        packets = [p for p in container.demux(stream) if p.size and not p.is_discard]
        if all(packet.pts is not None for packet in packets):
            return [float(packet.pts * stream.time_base) for packet in packets]
        container.seek(0)
    rate = float(stream.average_rate or stream.guessed_rate or 25)
    return [
        number / rate if frame.time is None else frame.time
        for number, frame in enumerate(container.decode(stream))
    ]


def video_digest(path: Path) -> str:
    """Return the SHA-256 of a video's content, of all frames where it is a folder."""
    digest = hashlib.sha256()
    for file in frames_in(path) if path.is_dir() else [path]:
        with open(file, "rb") as stream:
            while chunk := stream.read(CHUNK):
                digest.update(chunk)
    return digest.hexdigest()


def video_frames(
    path: Path, numbers: Collection[int], background: str
) -> Iterator[tuple[int, Image.Image]]:
    """Decode some frames of a video one after the other, upright, in RGB.

    They are counted as they are decoded, from the first, since not all formats can be sought in exactly.

    Args:
        path: A video file, or a folder of frames.
        numbers: Of the frames, in the order in which they are shown.
        background: Colour under transparent areas of frames in a folder.

    Yields:
        Number and frame, in that order.

    Raises:
        ValueError: One of them cannot be decoded.
    """
    wanted = sorted(set(numbers))
    if path.is_dir():
        files = frames_in(path)
        for number in wanted:
            yield (
                number,
                _frame(
                    files[number], lambda data, name: read_picture(data, background, name)
                ).colour,
            )
        return
    with _opened(path) as (container, stream):
        for number, frame in enumerate(container.decode(stream)):
            if number == wanted[0]:
                yield number, _upright(frame, stream)
                wanted.pop(0)
                if not wanted:
                    return
    raise ValueError(f"frame {wanted[0] + 1} cannot be decoded; the file seems to be cut off")


def _frame(file: Path, read):
    try:
        return read(read_file(file), file.name)
    except ValueError as error:
        raise ValueError(f"{file.name}: {error}") from error


def _upright(frame, stream) -> Image.Image:
    """Return a frame as it is seen: a phone says how it was held, old formats how wide a pixel is."""
    image = Image.fromarray(frame.to_ndarray(format="rgb24"))
    wide = stream.sample_aspect_ratio or 1
    if wide != 1:
        image = image.resize((max(1, round(image.width * wide)), image.height))
    turns = round(getattr(frame, "rotation", 0) / 90) % 4
    return Image.fromarray(np.ascontiguousarray(np.rot90(np.asarray(image), turns)))


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple]:
    """Open a video file and its first stream of pictures; what goes wrong inside says that it is damaged."""
    try:
        import av
    except ImportError as error:
        raise ValueError("reading videos needs the Python package av (pip install av)") from error
    try:
        options = {"format_whitelist": FORMATS, "protocol_whitelist": "file"}
        container = av.open(str(path), options=options)
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
