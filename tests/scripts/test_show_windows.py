"""scripts/show_windows.py: the windows as text and as a picture."""

import numpy as np
import pytest
from PIL import Image

from animatediff.utils import UserError
from scripts.show_windows import CELL, FULL, NONE, main


def test_text_and_picture(tmp_path, capsys):
    path = tmp_path / "windows.png"
    main(["--L", "12", "--steps", "2", "--length", "6", "--overlap", "2", "--fuse", "flat", "--png", str(path)])
    assert capsys.readouterr().out.splitlines() == [
        "step 0",
        "####55......",
        "....555555..",
        "......5555##",
        "step 1",
        "##5555......",
        "..555555....",
        "......55####",
        "the network sees every frame 1.50 times a step",
        str(path),
    ]
    picture = np.asarray(Image.open(path))
    assert picture.shape == (7 * CELL, 12 * CELL, 3)  # two steps of three windows, a gap between them
    assert tuple(picture[0, 0]) == FULL and tuple(picture[0, -1]) == NONE


def test_mistakes():
    with pytest.raises(UserError, match="schedule: got 'opn', expected open or closed"):
        main(["--schedule", "opn"])
    with pytest.raises(UserError, match="got --L 0"):
        main(["--L", "0"])
    with pytest.raises(UserError, match="--L: invalid int value: 'many'"):
        main(["--L", "many"])
