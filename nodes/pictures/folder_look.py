"""What is in a folder of pictures, for its node to show before anything is run."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from ...sara_core.pictures.picture_folder import find_pictures
from ...sara_core.pictures.video_folder import find_videos
from .. import host

PATH = "/sara/folder"
MAX_SHOWN = 24


def look(query: Mapping[str, str]) -> dict:
    """Count the pictures and captions of the folder `name` and list the first of them.

    With `subfolders=true` those of the folders in it count as well; with `kind=video` videos are looked for.

    Returns:
        `error` alone if there is no such folder; else `pictures`, `captions` by where they are from,
        `without` (a caption of their own), `same` (whether all that are there are equal),
        `problems`: the first of them, of `problem_count`, and `shown`: name, caption, and `file`, by which
        the page can ask for a thumbnail, of pictures, and when it `changed`.
    """
    name = query.get("name", "")
    try:
        is_of_videos = query.get("kind") == "video"
        find_folder = host.video_folder if is_of_videos else host.picture_folder
        folder, find = Path(find_folder(name)), find_videos if is_of_videos else find_pictures
        files, problems = find(folder, query.get("subfolders") == "true")
    except (OSError, ValueError) as error:
        return {"error": str(error)}
    problems = [problem for problem in problems if not problem.is_note]
    captions = [file.caption for file in files if file.caption is not None]
    return {
        "pictures": len(files),
        "captions": Counter(file.source for file in files if file.caption is not None),
        "without": len(files) - len(captions),
        "same": len(captions) > 1 and len(set(captions)) == 1,
        "problems": list(map(str, problems[:MAX_SHOWN])),
        "problem_count": len(problems),
        "shown": [
            {
                "name": Path(file.name).name,
                "caption": file.caption,
                "file": None if is_of_videos else file.name,
                "changed": file.path.stat().st_mtime_ns if file.path.is_file() else 0,
            }
            for file in files[:MAX_SHOWN]
        ],
    }
