"""Find the videos of a folder and their captions: files, and folders of frames."""

from collections.abc import Collection
from pathlib import Path

from .captions import CAPTION_ENDINGS, TABLES, Problem, folded
from .picture_folder import REPEATS, Kind, PictureFile, find_pictures, is_picture, natural
from .strays import is_hidden

ENDINGS = frozenset(".mp4 .m4v .mov .mkv .webm .avi .mpg .mpeg .gif".split())
FEWEST_FRAMES = 5  # in a folder that is taken for a video


def find_videos(folder: Path, recurse: bool = False) -> tuple[list[PictureFile], list[Problem]]:
    """List the videos of a folder with their captions, as `find_pictures` does for pictures.

    A folder of at least five pictures in it, and nothing else, is a video too: its frames.
    """
    return find_pictures(folder, recurse, VIDEOS)


def frames_in(folder: Path) -> list[Path]:
    """Return the frames of a folder of them, in natural order of their names."""
    frames = [path for path in folder.iterdir() if is_picture(path) and not path.is_symlink()]
    return sorted(frames, key=lambda path: natural(path.name))


def _is_video(path: Path) -> bool:
    if is_hidden(path) or path.is_symlink() and path.is_dir():
        return False
    if path.is_file():
        return path.suffix.lower() in ENDINGS
    if not path.is_dir() or REPEATS.fullmatch(path.name):
        return False
    inside = _inside(path)
    return len(inside) >= FEWEST_FRAMES and all(map(_is_frame, inside))


def _inside(folder: Path) -> list[Path]:
    try:
        return [entry for entry in folder.iterdir() if not is_hidden(entry)]
    except OSError:  # it is named where folders are listed
        return []


def _is_frame(path: Path) -> bool:
    return is_picture(path) and not path.is_symlink()  # a link may lead out of the folder


def _strays(folder: Path, listing: list[Path], used: Collection[Path]) -> list[Problem]:
    """Name the files of one folder that are no videos; pictures and their captions are for another node."""
    taken = {*used, *filter(is_picture, listing)}
    names = {folded(key) for path in taken for key in (path.stem, path.name)}
    found = []
    for path in listing:
        is_known = path in taken or is_hidden(path) or path.name.casefold() in TABLES
        if not is_known and path.is_dir() and not REPEATS.fullmatch(path.name):
            if sum(map(is_picture, _inside(path))) >= FEWEST_FRAMES:
                reason = "pictures beside other files or links; the frames of a video are to be alone in a folder"
                found.append(Problem(path.relative_to(folder).as_posix(), reason))
        if is_known or path.is_dir():
            continue
        reason = "not a video that is read"
        if path.suffix.lower() in CAPTION_ENDINGS:
            reason = "a caption without a video of its name"
            if folded(path.stem) in names:
                continue
        found.append(Problem(path.relative_to(folder).as_posix(), reason))
    return found


VIDEOS = Kind("video", _is_video, _strays)
