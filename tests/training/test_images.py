"""Still images as clips of one frame: captions, cuts, and files that are none."""

import numpy as np
import pytest
import torch
from PIL import Image

from animatediff.config.settings import build
from animatediff.training.data.images import ImageConfig, Images
from animatediff.training.data.reader import ClipBatch, ClipReader
from animatediff.utils import UserError


@pytest.fixture
def folder(tmp_path):
    """Two pictures whose red grows to the right, one of them without a caption, and a page of text."""
    ramp = np.zeros((20, 40, 3), np.uint8)
    ramp[..., 0] = np.arange(40) * 6
    for name in ("a", "b"):
        Image.fromarray(ramp).save(tmp_path / f"{name}.png")
    (tmp_path / "a.txt").write_text("a ramp\n")
    (tmp_path / "page.jpg").write_text("<html>")
    (tmp_path / "page.txt").write_text("a page")
    return tmp_path


def series(folder, **values) -> Images:
    return Images(ImageConfig(image_folder=str(folder), **{"sample_size": (10,), **values}))


def read(pictures: Images, count: int, log=lambda line: None) -> ClipBatch:
    return next(ClipReader(pictures, num_workers=0, log=log).batches([range(count)]))


def test_a_picture_is_a_clip_of_one_frame(folder):
    clips = read(series(folder, caption="a thing"), 6)  # the page is left out
    assert set(clips.captions) == {"a ramp", "a thing"}
    for pixels in clips.video:
        assert pixels.shape == (1, 3, 10, 10) and -1 <= pixels.min() and pixels.max() <= 1
        red = pixels[0, 0].mean(dim=0)
        assert (red.diff() > 0).all() and red[5] == pytest.approx(20 * 6 / 127.5 - 1, abs=0.1)  # the middle
    assert torch.equal(clips.video[0], series(folder, caption="a thing")[0].pixels)


def test_crops_and_mirrors_are_drawn(folder):
    pictures = series(folder, caption="x", crop="random", flip=True)
    rows = [pictures[i].pixels[0, 0].mean(dim=0) for i in range(12)]
    assert {bool(row[0] < row[-1]) for row in rows} == {True, False}
    assert len({round(float(row.mean()), 2) for row in rows}) > 4


def test_files_that_are_no_pictures_are_named_once(folder):
    lines = []
    pictures = series(folder)
    clips = read(pictures, 9, lines.append)
    assert set(clips.captions) == {"a ramp"} and set(clips.names) == {str(folder / "a.png")}
    assert len(lines) == 2 and "b.png: no caption" in " ".join(lines) and "page.jpg: unreadable" in " ".join(lines)
    report = str(pictures.scan()).splitlines()
    assert report[:3] == ["1 of 3 pictures can be used", "no caption: 1", f"  {folder / 'b.png'}"]
    assert report[3] == "unreadable: 1" and report[4].startswith(f"  {folder / 'page.jpg'} (")


def test_mistakes(folder, tmp_path):
    with pytest.raises(UserError, match="which is no folder"):
        series(tmp_path / "none")
    (folder / "empty").mkdir()
    with pytest.raises(UserError, match="without a picture"):
        series(folder / "empty")
    (folder / "a.png").unlink()
    with pytest.raises(UserError, match="2 files of which none gives a picture"):
        read(series(folder), 1)
    with pytest.raises(UserError, match="sample_size"):
        build(ImageConfig, {"image_folder": "x", "sample_size": (1, 2, 3)}, where="image_data")
