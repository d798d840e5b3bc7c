"""Pictures and clips with the texts that other programs put into them."""

from pathlib import Path

import av
import numpy as np
from PIL import Image, PngImagePlugin

PIXELS = np.zeros((2, 16, 16, 3), np.uint8)


def as_png(path: Path, **texts: str) -> Path:
    info = PngImagePlugin.PngInfo()
    for name, text in texts.items():
        info.add_text(name, text)
    Image.fromarray(PIXELS[0]).save(path, pnginfo=info)
    return path


def with_exif(path: Path, comment: bytes = b"", **tags: str) -> Path:
    exif = Image.Exif()
    for name, text in tags.items():
        exif[{"make": 0x010F, "model": 0x0110}[name]] = text
    if comment:
        exif.get_ifd(0x8769)[0x9286] = comment
    Image.fromarray(PIXELS[0]).save(path, exif=exif)
    return path


def as_mp4(path: Path, options: dict[str, str] | None = None, **texts: str) -> Path:
    with av.open(str(path), "w", options=options or {}) as file:
        file.metadata.update(texts)
        stream = file.add_stream("libx264", 8)
        stream.width = stream.height = 16
        stream.pix_fmt = "yuv420p"
        for frame in PIXELS:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(format="yuv420p")))
        file.mux(stream.encode())
    return path
