"""Still images as clips of one frame: captions, cuts, and files that are none."""

import numpy as np
import pytest
import torch
from PIL import Image

from animatediff.training.data.images import ImageConfig, Images
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


def series(folder, log=print, **values) -> Images:
    return Images(ImageConfig(str(folder), **{"sample_size": (10,), **values}), log=log)


def test_a_picture_is_a_clip_of_one_frame(folder):
    pictures = series(folder, caption="a thing", log=lambda line: None)  # the page is left out
    clips = [pictures.clip(i) for i in range(6)]
    assert {caption for _, caption in clips} == {"a ramp", "a thing"}
    for pixels, _ in clips:
        assert pixels.shape == (1, 3, 10, 10) and -1 <= pixels.min() and pixels.max() <= 1
        red = pixels[0, 0].mean(dim=0)
        assert (red.diff() > 0).all() and red[5] == pytest.approx(20 * 6 / 127.5 - 1, abs=0.1)  # the middle
    assert torch.equal(clips[0][0], series(folder, caption="a thing", log=print).clip(0)[0])


def test_crops_and_mirrors_are_drawn(folder):
    pictures = series(folder, caption="x", crop="random", flip=True, log=lambda line: None)
    rows = [pictures.clip(i)[0][0, 0].mean(dim=0) for i in range(12)]
    assert {bool(row[0] < row[-1]) for row in rows} == {True, False}
    assert len({round(float(row.mean()), 2) for row in rows}) > 4


def test_files_that_are_no_pictures_are_named_once(folder):
    lines = []
    pictures = series(folder, log=lines.append)
    assert {pictures.clip(i)[1] for i in range(9)} == {"a ramp"}
    assert len(lines) == 2 and "b.png: no caption" in " ".join(lines) and "page.jpg: unreadable" in " ".join(lines)
    assert pictures.name(0) == str(folder / "a.png")
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
        series(folder, log=lambda line: None).clip(0)
    with pytest.raises(UserError, match="sample_size"):
        ImageConfig("x", sample_size=(1, 2, 3))
