"""H.264 in MP4, in the colours of HD video."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from fractions import Fraction
from pathlib import Path

import numpy as np

from animatediff.media.sound import Sound, SoundTrack, open_sound
from animatediff.utils import UserError

CRF = "12"  # visually lossless
TAGS = {"colorspace": "bt709", "color_primaries": "bt709", "color_trc": "bt709", "color_range": "tv"}
SCALER = 4 | 1 << 18  # swscale's BICUBIC and ACCURATE_RND


def write_mp4(frames: Iterable[np.ndarray], path: Path, fps: float, comment: str, sound: Sound | None = None) -> None:
    """Write frames, uint8 (H, W, 3), as they come. An odd height or width repeats its last row or column.

    By PyAV, imageio's own backend, as imageio can choose neither quality nor colours (docs/media.md). A `sound` is
    copied and ends with the frames.

    Raises:
        UserError: the encoder takes no such frames, or the sound cannot be copied.
        OSError: what the system refuses, until the last byte is written.
    """
    import av
    from av.video.reformatter import ColorRange, Colorspace

    colors = {"dst_colorspace": Colorspace.ITU709, "dst_color_range": ColorRange.MPEG}
    try:
        with ExitStack() as stack:
            source = sound and stack.enter_context(open_sound(sound.path))
            file = stack.enter_context(av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"}))
            file.metadata["comment"] = comment
            stream = file.add_stream("libx264", Fraction(fps).limit_denominator(65535), {"crf": CRF, **TAGS})
            stream.pix_fmt = "yuv420p"
            track = SoundTrack(source, sound.start, file) if sound else None
            for count, frame in enumerate(frames, 1):
                height, width, _ = frame.shape
                even = np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
                picture = av.VideoFrame.from_ndarray(even, format="rgb24")
                picture = picture.reformat(format="yuv420p", interpolation=SCALER, threads=1, **colors)
                if not stream.codec_context.is_open:
                    stream.height, stream.width = picture.height, picture.width
                file.mux(stream.encode(picture))
                if track:
                    track.write(until=count / fps)
            file.mux(stream.encode())
    except (av.FFmpegError, ValueError) as error:
        if isinstance(error, OSError):
            raise
        raise UserError(f"got frames that cannot be written as MP4 ({error}): use gif or webp") from None
