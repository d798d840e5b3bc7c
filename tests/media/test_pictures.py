"""What a user gives as pictures or clips: read from any file, cropped and resized, mistakes named."""

import numpy as np
import pytest
import torch
from PIL import Image

from animatediff.media.pictures import crop_box, fit_frames
from animatediff.media.video import read_video, save_video
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
        ("gone.gif", "which is no file"),
        ("text.gif", "expected a GIF, WebP, MP4 or PNG"),
        ("cut.webp", "cannot be decoded"),
    ):
        with pytest.raises(UserError, match=message) as error:
            read_video(tmp_path / name)
        assert "\n" not in str(error.value)
    for frames in ([], ["a.png"]):
        with pytest.raises(UserError, match="expected at least one picture"):
            fit_frames(frames, 8, 8)
