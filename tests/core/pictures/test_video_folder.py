"""Videos of a folder, as people lay them out: files, and folders of frames."""

from PIL import Image

from sara_core.pictures.picture_folder import find_pictures
from sara_core.pictures.video_folder import find_videos, frames_in


def make(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".png":
            Image.new("RGB", (32, 32)).save(path)
        else:
            path.write_bytes(b"a caption" if path.suffix == ".txt" else b"\0")


def found(folder, recurse=False):
    files, problems = find_videos(folder, recurse)
    return {f.name: (f.caption, f.source, f.repeats) for f in files}, {str(p) for p in problems}


def test_files_and_folders_of_frames_with_captions_and_repeats(tmp_path):
    frames = [f"walk/{i}.png" for i in (10, 9, 8, 2, 1)]
    make(
        tmp_path,
        "a.mp4",
        "a.txt",
        "B.MOV",
        *frames,
        "walk.txt",
        "3_sks dog/c.webm",
        "still.png",
        "still.txt",
    )
    files, problems = found(tmp_path)
    assert files == {
        "3_sks dog/c.webm": ("sks dog", "folder name", 3),
        "a.mp4": ("a caption", ".txt", 1),
        "B.MOV": (None, "", 1),
        "walk": ("a caption", ".txt", 1),
    }
    assert problems == set()
    assert [path.name for path in frames_in(tmp_path / "walk")] == [
        "1.png", "2.png", "8.png", "9.png", "10.png",
    ]  # fmt: skip


def test_what_is_not_taken_is_named(tmp_path):
    make(tmp_path, "a.mp4", "b.txt", "notes.pdf", "deep/c.mkv", *(f"few/{i}.png" for i in range(4)))
    files, problems = found(tmp_path)
    assert list(files) == ["a.mp4"]
    assert problems == {
        "b.txt: a caption without a video of its name",
        "notes.pdf: not a video that is read",
        "deep: videos in it are not taken (1); turn subfolders on, or choose it itself",
    }
    files, problems = found(tmp_path, recurse=True)
    assert list(files) == ["a.mp4", "deep/c.mkv"]


def test_folders_that_are_no_videos_say_why(tmp_path):
    make(tmp_path, "a.mp4", *(f"noted/{i}.png" for i in range(6)), "noted/notes.pdf")
    linked = tmp_path / "linked"
    make(tmp_path.parent / "outside", *(f"{i}.png" for i in range(6)))
    linked.mkdir()
    for i in range(6):
        (linked / f"{i}.png").symlink_to(tmp_path.parent / "outside" / f"{i}.png")
    make(tmp_path, *(f"deep/walk/{i}.png" for i in range(6)))
    files, problems = found(tmp_path)
    assert list(files) == ["a.mp4"]
    reason = (
        "pictures beside other files or links; the frames of a video are to be alone in a folder"
    )
    assert problems == {
        f"noted: {reason}",
        f"linked: {reason}",
        "deep: videos in it are not taken (1); turn subfolders on, or choose it itself",
    }


def test_the_folder_of_pictures_says_who_reads_videos(tmp_path):
    make(tmp_path, "a.mp4", "b.png")
    files, problems = find_pictures(tmp_path)
    assert [file.name for file in files] == ["b.png"]
    assert list(map(str, problems)) == ["a.mp4: a video; SaRA Video Folder reads it"]
