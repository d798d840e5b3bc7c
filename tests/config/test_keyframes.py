"""The grammar of numbers that change over frames or steps."""

import pytest

from animatediff.config.keyframes import Keyframes
from animatediff.utils import UserError


def over_frames(raw, frames):
    return [Keyframes.read(raw, "x").at(frame, 0.0) for frame in range(frames)]


def test_grammar():
    assert over_frames(0.7, 3) == [0.7] * 3
    assert over_frames([1, 0.5, 0], 3) == [1, 0.5, 0]
    assert over_frames({1: 1.0, 3: 0.0}, 5) == [1, 1, 0.5, 0, 0]
    assert over_frames({"3": 0.0, "1": 1.0}, 5) == [1, 1, 0.5, 0, 0], "in any order, and as dumped configs have them"
    steps = Keyframes.read({"0%": 2, "50%": 1}, "x")
    assert [steps.at(9, part) for part in (0, 0.25, 0.5, 1)] == [2, 1.5, 1, 1]
    assert Keyframes.read(steps, "x") is steps


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({}, "x: got no keyframes"),
        ([], "x: got no keyframes"),
        ({0: 1, "50%": 2}, "x: got both frames and parts"),
        ({-1: 1}, "x: got a keyframe at -1, expected a frame number from 0, or a part"),
        ({"a": 1}, "x: got a keyframe at a"),
        ({"101%": 1}, "x: got a keyframe at 101%, expected 0% to 100%"),
        ({0: "much"}, "x: got 'much', expected 0 or more"),
        (-1, "x: got -1, expected 0 or more"),
        ([0, float("nan")], "x: got nan, expected 0 or more"),
        ({0: 1, 16: 0}, "x: got a keyframe at frame 16, expected 0 to 15"),
        ([1, 0], "x: got 2 numbers for 16 frames"),
    ],
)
def test_mistakes(raw, message):
    with pytest.raises(UserError, match=message):
        Keyframes.read(raw, "x", least=0).check("x", 16)
