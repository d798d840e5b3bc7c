"""Small video files that tests encode themselves: the number of every frame can be read from its pixels."""

from collections.abc import Iterable
from pathlib import Path

import av
import numpy as np
from torch import Tensor

from animatediff.media.video import save_video

HEIGHT, WIDTH = 48, 64
RATE = 44_100  # of sound


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


def encode(path: Path, shown: Iterable[int] = (), *, fps: int = 25, sound: float = 0, turned: int = 0) -> Path:
    """A video whose frame i is shown from i / fps on, for each i in `shown`, and a tone of so many seconds.

    Args:
        turned: degrees, counterclockwise, that players are told to turn it by.
    """
    with av.open(str(path), "w") as file:
        streams = []
        if shown := list(shown):
            video = file.add_stream("libx264", fps, {"crf": "12"})
            video.width, video.height, video.pix_fmt = WIDTH, HEIGHT, "yuv420p"
            if turned:
                video.set_display_rotation(turned)
            streams.append(video)
        if sound:
            tone = file.add_stream("aac", RATE, layout="mono")
            streams.append(tone)
        for number, pixels in zip(shown, numbered(max(shown, default=0) + 1)[shown], strict=True):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts = number
            file.mux(video.encode(frame))
        for start in range(0, round(sound * RATE), 1024):
            wave = 0.1 * np.sin(np.arange(start, start + 1024) * 0.05).astype(np.float32)[None]
            frame = av.AudioFrame.from_ndarray(wave, format="fltp", layout="mono")
            frame.sample_rate, frame.pts = RATE, start
            file.mux(tone.encode(frame))
        for stream in streams:
            file.mux(stream.encode())
    return path


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
    encode(folder / "sound.mp4", sound=3)
    (folder / "sound.txt").write_text("a tone")
    write(folder / "short.mp4", frames=12)
    encode(folder / "uneven.mp4", [*range(10), *range(13, 40)])
    (folder / "uneven.txt").write_text("a gray wall")
    write(folder / "mute.mp4", caption=None)
    return {
        "empty.mp4": "zero length",
        "few_pictures.mp4": "damaged",
        "half_an_index.mp4": "unreadable",
        "mute.mp4": "no caption",
        "no_index.mp4": "unreadable",
        "page.mp4": "unreadable",
        "short.mp4": "too short",
        "sound.mp4": "no video stream",
    }
