"""What a user gives as pictures or clips: read from any file, cropped and resized, mistakes named."""

import os
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from animatediff.media.pictures import (
    EXIF_ORIENTATION,
    crop_box,
    fit_frames,
    fit_pictures,
    read_mask,
    read_picture,
    to_rgb,
)
from animatediff.media.video import read_metadata, read_video, save_video
from animatediff.utils import UserError
from tests.media.videos import numbered, numbers


@pytest.mark.parametrize(
    ("size", "aspect", "box"),
    [
        ((64, 64), 1.0, (0, 0, 64, 64)),
        ((100, 50), 1.0, (25, 0, 75, 50)),
        ((50, 101), 1.0, (0, 25, 50, 75)),
        ((640, 480), 16 / 9, (0, 60, 640, 420)),
        ((1000, 1), 0.01, (499, 0, 500, 1)),
    ],
)
def test_crop_box(size, aspect, box):
    assert crop_box(size, aspect) == box


def test_fit_crops_the_middle_and_resizes():
    """Twice as wide as high, its outer quarters black; and a picture of the right size stays as it is."""
    picture = np.zeros((40, 80, 3), np.uint8)
    picture[:, 20:60] = (255, 102, 0)
    (fitted,) = fit_frames([Image.fromarray(picture)], 16, 16)
    assert fitted.shape == (3, 16, 16)
    assert torch.allclose(fitted, torch.tensor([1.0, -0.2, -1.0]).reshape(3, 1, 1).expand_as(fitted), atol=1e-6)
    exact = np.random.default_rng(0).integers(0, 256, (2, 8, 16, 3), dtype=np.uint8)
    assert torch.equal(fit_frames(exact, 8, 16), torch.from_numpy(exact).movedim(-1, 1).float() / 127.5 - 1)
    assert fit_frames(exact, 8, 16, mode="L").shape == (2, 1, 8, 16)


def test_shrinking_averages():
    """Bilinear with its support widened, as Pillow has it: a checkerboard becomes gray."""
    board = np.indices((64, 64)).sum(0) % 2 * 255
    small = fit_frames(np.repeat(board[None, ..., None], 3, axis=-1).astype(np.uint8), 8, 8)
    assert small.abs().max() < 0.02


@pytest.mark.parametrize("name", ["clip.gif", "clip.webp", "clip.mp4", "clip.MOV", "folder"])
def test_the_first_frames_of_every_format(tmp_path, name):
    written = save_video(numbered(8), tmp_path / name.replace("MOV", "mp4"))
    path = written.rename(tmp_path / name)
    assert numbers(read_video(path, most=3)[0]) == [0, 1, 2]
    assert len(read_video(path, most=20)[0]) == len(read_video(path)[0]) == 8


def test_pictures(tmp_path):
    """A folder of photographs in the order of their names, one of them turned by its camera; and a single one."""
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    Image.new("RGB", (8, 16), "red").save(tmp_path / "b.jpg", quality=100)
    Image.new("RGB", (16, 8), "blue").save(tmp_path / "a.JPG", exif=exif)
    (tmp_path / "notes.txt").write_text("no picture")
    frames, fps = read_video(tmp_path)
    assert frames.shape == (2, 16, 8, 3) and fps == 8
    assert frames[:, 8, 4].argmax(-1).tolist() == [2, 0]
    assert torch.equal(read_video(tmp_path / "b.jpg")[0], frames[1:])


def test_mistakes_are_named(tmp_path):
    for name in ("none", "sizes"):
        (tmp_path / name).mkdir()
    Image.new("RGB", (8, 16)).save(tmp_path / "sizes/a.png")
    Image.new("RGB", (9, 16)).save(tmp_path / "sizes/b.png")
    whole = save_video(numbered(4), tmp_path / "cut.webp").read_bytes()
    (tmp_path / "cut.webp").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.gif").write_text("hello")
    for name, message in (
        ("sizes", "frames of 8x16 and 9x16 pixels, expected one size"),
        ("none", "holds no pictures"),
        ("gone.gif", "which does not exist"),
        ("text.gif", "expected a picture .*: it is none"),
        ("cut.webp", "cannot be decoded"),
    ):
        with pytest.raises(UserError, match=message) as error:
            read_video(tmp_path / name)
        assert "\n" not in str(error.value)
    for frames in ([], [8], ["a.png"]):
        with pytest.raises(UserError, match="expected at least one picture"):
            fit_frames(frames, 8, 8)


# ---- every mode that Pillow knows: as viewers show it, from whoever asks

RAMP = np.arange(0, 256, 5, dtype=np.uint8)[None].repeat(4, axis=0)  # (4, 52)
GREEN = np.zeros((4, 6, 4), np.uint8) + np.array([0, 255, 0, 0], np.uint8)  # transparent, but for its left half
GREEN[:, :3, 3] = 255


def as_mode(mode: str) -> tuple[Image.Image, str]:
    """The ramp in a mode, and the ending of a file that holds it."""
    gray = Image.fromarray(RAMP)
    if mode == "I;16":
        return Image.fromarray(RAMP.astype(np.uint16) * 257), ".png"
    if mode == "I":
        return Image.fromarray(RAMP.astype(np.int32) * 257), ".tiff"
    if mode == "F":
        return Image.fromarray(RAMP.astype(np.float32) / 255), ".tiff"
    if mode == "1":
        return gray.point(lambda value: 255 * (value > 127)).convert("1"), ".png"
    return gray.convert(mode) if mode == "P" else gray.convert("RGB").convert(mode), ".tiff" if mode in (
        "CMYK",
        "YCbCr",
    ) else ".png"


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "I;16", "I", "F", "CMYK", "YCbCr"])
def test_every_mode(tmp_path, mode):
    if mode == "PA":
        picture, ending = Image.fromarray(RAMP).convert("PA"), ".png"
        picture = picture.convert("RGBA")  # no file holds it: Pillow writes and reads it as RGBA
    else:
        picture, ending = as_mode(mode)
    expected = 255 * (RAMP > 127) if mode == "1" else RAMP
    packed = {"compression": "packbits"} if mode == "YCbCr" else {}  # Pillow 12.3 cannot read the plain ones it writes
    picture.save(path := tmp_path / f"x{ending}", **packed)
    for pixels in (read_picture(path), fit_pictures([picture], *RAMP.shape)[0].movedim(0, -1).numpy()):
        assert pixels.dtype == np.uint8 and pixels.shape == (*RAMP.shape, 3)
        assert np.abs(pixels.astype(int) - expected[..., None]).max() <= 1
    assert np.abs(read_mask(path, height=4, width=52).numpy() * 255 - expected).max() <= 1.01


def test_sixteen_bits(tmp_path):
    """v / 257: of a ramp of 64 steps, 0, 130 and 255 at 0, 32 and 63; RGB, too, which Pillow cuts to its upper byte."""
    ramp = np.linspace(0, 65535, 64).round().astype(np.uint16)[None].repeat(4, axis=0)
    Image.fromarray(ramp).save(tmp_path / "x.png")
    assert read_picture(tmp_path / "x.png")[0, [0, 32, 63], 1].tolist() == [0, 130, 255]
    colored = np.stack([ramp, ramp[:, ::-1], ramp], axis=-1).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in colored)
    header = struct.pack(">IIBBBBB", 64, 4, 16, 2, 0, 0, 0)
    parts = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    chunks = [struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in parts]
    (tmp_path / "rgb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))
    read = read_picture(tmp_path / "rgb.png").astype(float)
    assert np.abs(read - colored.astype(float) / 257).max() <= 1


@pytest.mark.parametrize("kind", ["rgba.png", "palette.png", "gray.png", "still.webp", "x.gif", "x.webp", "x.apng"])
def test_what_is_transparent_shows_the_background(tmp_path, kind, capfd, recwarn):
    """Green hides in the right half: white there, black for masks, and not a word on the console."""
    picture = Image.fromarray(GREEN)
    if kind == "palette.png":
        picture = picture.quantize(4)
    elif kind == "gray.png":
        picture = Image.merge("LA", [Image.fromarray(GREEN[..., 1]), Image.fromarray(GREEN[..., 3])])
    more = {"save_all": True, "append_images": [picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)]}
    options = {"lossless": True} if kind.endswith("webp") else {"format": "PNG"} if kind.endswith("png") else {}
    more |= {"disposal": 2} if kind == "x.gif" else {}
    picture.save(path := tmp_path / kind, **options, **(more if kind.startswith("x.") else {}))
    for background in (0, 255):
        frames, _ = read_video(path, background=background)
        assert len(frames) == 2 if kind.startswith("x.") else 1
        shown = frames[0].numpy()
        assert (shown[:, 3:] == background).all() and (shown[:, :3, 1] == 255).all()
        if len(frames) > 1:
            assert (frames[1].numpy()[:, :3] == background).all() and (frames[1].numpy()[:, 3:, 1] == 255).all()
    for pictures in ([path], [picture]):
        fitted = fit_pictures(pictures, 4, 6)
        assert (fitted[0, :, :, 3:] == 255).all() and (fitted[0, 1, :, :3] == 255).all()
    assert (fit_frames([picture], 4, 6, mode="L")[..., 3:] == -1).all()
    assert (read_mask(path, height=4, width=6)[:, 3:] == 0).all()
    assert not [w for w in recwarn if "PIL" in w.filename] and capfd.readouterr().err == ""


@pytest.mark.parametrize("mode", ["L", "P", "RGB", "RGBA", "I;16"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_camera_s_orientation(tmp_path, mode, orientation):
    """As Pillow turns it; also where imageio would turn the colours of gray and palettes."""
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = orientation
    picture = as_mode(mode)[0].crop((10, 0, 20, 4))
    picture.save(path := tmp_path / "x.png", exif=exif)
    with Image.open(path) as opened:
        expected = (
            to_rgb(np.asarray(ImageOps.exif_transpose(opened).convert(mode)))
            if mode == "I;16"
            else np.asarray(ImageOps.exif_transpose(opened).convert("RGB"))
        )
        assert np.array_equal(fit_pictures([opened], *expected.shape[:2])[0].movedim(0, -1).numpy(), expected)
    assert np.array_equal(read_picture(path), expected)
    assert np.array_equal(read_video(path)[0][0].numpy(), expected)
    assert read_mask(path, height=expected.shape[0], width=expected.shape[1]).shape == expected.shape[:2]


def test_drawings_and_programs_are_no_pictures(tmp_path):
    """Pillow would start Ghostscript for PostScript, whatever the file's name."""
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n%%EndComments\n%%EOF\n"
    wmf = b"\xd7\xcd\xc6\x9a" + bytes(18) + b"\x01\0\x09\0" + bytes(40)
    for content in (eps, b"\xc5\xd0\xd3\xc6" + bytes(26) + eps, wmf, b"", b"/* XPM */ static char", bytes(100)):
        (tmp_path / "x.png").write_bytes(content)
        for read in (read_video, read_picture, read_metadata):
            with pytest.raises(UserError, match="x.png, expected a picture .*: it is none"):
                read(tmp_path / "x.png")


def test_bombs(tmp_path):
    """Small files of large pictures, and of long texts."""
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    text = b"Comment\0\0" + zlib.compress(bytes(2**26))
    for kind, data in ((b"IHDR", header), (b"zTXt", text)):
        parts = [(b"IHDR", struct.pack(">IIBBBBB", 4, 4, 8, 2, 0, 0, 0))] if kind != b"IHDR" else []
        parts += [(kind, data), (b"IDAT", zlib.compress(bytes(52))), (b"IEND", b"")]
        chunks = [struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in parts]
        (tmp_path / "x.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))
        for read in (read_video, read_picture, read_metadata):
            with pytest.raises(UserError, match="x.png"):
                read(tmp_path / "x.png")
    (tmp_path / "x.gif").write_bytes(b"GIF89a" + struct.pack("<HHBBB", 65535, 65535, 0, 0, 0) + b",;")
    with pytest.raises(UserError, match="x.gif"):
        read_video(tmp_path / "x.gif")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes on this system")
@pytest.mark.parametrize("name", ["x.png", "x.gif", "x.mp4", "x"])
def test_a_named_pipe_is_refused(tmp_path, name):
    """Nobody writes to it: opened, it would hang for ever."""
    os.mkfifo(path := tmp_path / name)
    for read in (read_video, read_metadata, read_picture, lambda p: read_mask(p, height=4, width=4)):
        with pytest.raises(UserError, match="x.*, which is no file|missing"):
            read(path)
    with pytest.raises(UserError, match="which is no file"):
        fit_pictures([path], 4, 4)
