"""Small video files that tests encode themselves: the number of every frame can be read from its pixels."""

import subprocess
from pathlib import Path

import numpy as np
from torch import Tensor

from animatediff.media.video import require_ffmpeg, save_video

HEIGHT, WIDTH = 48, 64


def numbered(frames: int) -> np.ndarray:
    """uint8 (f, 48, 64, 3): frame i is gray of 5 i + 10, its left half a little redder."""
    video = np.tile((np.arange(frames) * 5 + 10).astype(np.uint8)[:, None, None, None], (1, HEIGHT, WIDTH, 3))
    video[:, :, : WIDTH // 2, 0] += 20
    return video


def numbers(frames: Tensor) -> list[int]:
    """The numbers of frames (f, H, W, 3) in 0 … 255, of which the codec makes blue a little darker."""
    return ((frames.float()[..., 2].mean(dim=(1, 2)) - 8.5) / 5).round().int().tolist()


def write(path: Path, *, frames: int = 40, fps: float = 25, caption: str | None = "a gray wall") -> Path:
    save_video(numbered(frames), path, fps=fps)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption)
    return path


def ffmpeg(*arguments: str) -> None:
    command = [require_ffmpeg().get_ffmpeg_exe(), "-v", "error", "-nostdin", "-y", "-threads", "1", *arguments]
    subprocess.run(command, check=True)


def write_broken(folder: Path) -> dict[str, str]:
    """One file of each kind that gives no clip of 16 frames at stride 2; name -> reason.

    Two files beside them do: `whole.mp4`, and `uneven.mp4`, of variable rate.
    """
    whole = write(folder / "whole.mp4").read_bytes()
    pictures = whole.index(b"mdat")  # behind the index, as players of half a file want it
    content = {
        "empty.mp4": b"",
        "page.mp4": b"<html>not found</html>" * 100,
        "half_an_index.mp4": whole[: pictures // 2],
        "no_index.mp4": whole[:32] + whole[pictures - 4 :],
        "few_pictures.mp4": whole[: pictures + (len(whole) - pictures) // 4],
    }
    for name, data in content.items():
        (folder / name).write_bytes(data)
        (folder / name).with_suffix(".txt").write_text("a caption")
    ffmpeg("-f", "lavfi", "-i", "sine=duration=3", str(folder / "sound.mp4"))
    (folder / "sound.txt").write_text("a tone")
    write(folder / "short.mp4", frames=12)
    gap = ["-vf", "select='not(between(n,10,12))'", "-fps_mode", "vfr"]
    ffmpeg("-i", str(folder / "whole.mp4"), *gap, str(folder / "uneven.mp4"))
    (folder / "uneven.txt").write_text("a gray wall")
    write(folder / "mute.mp4", caption=None)
    return {
        "empty.mp4": "zero length",
        "few_pictures.mp4": "unreadable",
        "half_an_index.mp4": "unreadable",
        "mute.mp4": "no caption",
        "no_index.mp4": "unreadable",
        "page.mp4": "unreadable",
        "short.mp4": "too short",
        "sound.mp4": "no video stream",
    }
