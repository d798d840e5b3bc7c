"""Hints from pictures against the numbers of OpenCV and the annotators; what is missing or misspelt is named."""

import sys

import numpy as np
import pytest
import torch
from PIL import Image

from animatediff.media.preprocess import PREPROCESSORS, make_hint
from animatediff.media.scribble import draw_scribbles
from animatediff.utils import UserError
from tests.control import EXPECTED

PICTURE = Image.fromarray(EXPECTED["pre.image"].numpy())
cv2_only = pytest.mark.skipif(not __import__("importlib").util.find_spec("cv2"), reason="needs OpenCV")


def hint(how: str, picture: Image.Image = PICTURE, **settings: float) -> np.ndarray:
    return make_hint(picture, picture.height, picture.width, how=how, **settings).astype(int)


@cv2_only
@pytest.mark.parametrize(
    ("how", "settings", "name", "levels", "pixels"),
    [
        ("canny", {}, "pre.canny_100_200", 0, 0),
        ("canny", {"low": 20, "high": 60}, "pre.canny_20_60", 0, 0),
        ("blur", {"sigma": 9}, "pre.blur_9", 2, 0),  # OpenCV's versions round their kernels differently
        ("scribble", {"threshold": 32}, "pre.xdog_32", 0, 4),
        ("lineart", {}, "pre.lineart_standard", 1, 4),
    ],
)
def test_numbers(how, settings, name, levels, pixels):
    expected = EXPECTED[name].numpy().astype(int)
    got = hint(how, **settings)
    assert got.shape == (96, 128, 3)
    wrong = np.abs(got - (expected if expected.ndim == 3 else expected[..., None])).max(axis=2) > levels
    assert wrong.sum() <= pixels


@cv2_only
def test_tile_loses_details_and_keeps_the_rest():
    checks = np.indices((64, 64)).sum(axis=0) % 2 * 255
    picture = Image.fromarray(np.repeat(checks[..., None], 3, axis=2).astype(np.uint8))
    assert np.ptp(hint("tile", picture)) <= 1
    assert np.array_equal(hint("tile", picture, rate=1), np.asarray(picture))


def test_maps():
    grey = Image.fromarray(np.tile(np.arange(128, dtype=np.uint8), (96, 1)))
    assert (hint("threshold", grey, level=63)[:, :, 0] == np.where(np.arange(128) > 63, 255, 0)).all()
    assert np.array_equal(hint("invert", grey), 255 - hint("none", grey))
    half_transparent = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    assert (hint("none", half_transparent) == 255).all()


def test_outlines_are_those_of_training():
    frames = torch.from_numpy(np.asarray(PICTURE).copy()).permute(2, 0, 1)[None] / 127.5 - 1
    lines = hint("outlines")
    assert set(np.unique(lines)) == {0, 255} and np.array_equal(lines[:, :, 0] > 0, draw_scribbles(frames)[0].numpy())


def test_sizes_and_colours():
    """A wide map is cropped around its centre; a segmentation has its own colours still, a drawing has soft edges."""
    classes = np.array([[120, 10, 10], [10, 120, 10], [10, 10, 120]], dtype=np.uint8)
    segments = Image.fromarray(classes[np.arange(90)[None, :] // 30 * np.ones((30, 1), int)])
    small = make_hint(segments, 17, 34)
    assert small.shape == (17, 34, 3)
    assert {tuple(c) for c in small.reshape(-1, 3).tolist()} <= {tuple(c) for c in classes.tolist()}
    centre = make_hint(segments, 20, 20)
    assert (centre == classes[1]).all()
    lines = Image.fromarray(np.where(np.arange(64) % 8 == 0, 255, 0).astype(np.uint8) * np.ones((64, 1), np.uint8))
    assert len(np.unique(make_hint(lines, 48, 48))) > 2


def test_mistakes_are_named(monkeypatch):
    with pytest.raises(UserError, match="preprocessor: got 'cany', expected one of none, canny"):
        hint("cany")
    with pytest.raises(UserError, match="preprocessor canny: got the setting 'hi', expected one of low, high"):
        hint("canny", hi=3)
    with pytest.raises(UserError, match="preprocessor invert: got the setting 'hi', expected none"):
        hint("invert", hi=3)
    monkeypatch.setitem(sys.modules, "cv2", None)
    for how in ("canny", "blur", "tile", "scribble", "lineart"):
        with pytest.raises(UserError, match="pip install opencv-python-headless.*extra `hints`"):
            hint(how)
    assert set(PREPROCESSORS) == {
        "none",
        "canny",
        "blur",
        "tile",
        "scribble",
        "lineart",
        "outlines",
        "invert",
        "threshold",
    }
