"""The grammar of numbers that change over frames or steps."""

import pytest

from animatediff.config.keyframes import Keyframes
from animatediff.utils import UserError


def over_frames(raw, frames):
    return [Keyframes.read(raw).at(frame, 0.0) for frame in range(frames)]


def test_grammar():
    assert over_frames(0.7, 3) == [0.7] * 3
    assert over_frames([1, 0.5, 0], 3) == [1, 0.5, 0]
    assert over_frames({1: 1.0, 3: 0.0}, 5) == [1, 1, 0.5, 0, 0]
    assert over_frames({"3": 0.0, "1": 1.0}, 5) == [1, 1, 0.5, 0, 0], "in any order, and as dumped configs have them"
    steps = Keyframes.read({"0%": 2, "50%": 1})
    assert [steps.at(9, part) for part in (0, 0.25, 0.5, 1)] == [2, 1.5, 1, 1]
    assert Keyframes.read(steps) is steps


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({}, "got no keyframes"),
        ([], "got no keyframes"),
        ({0: 1, "50%": 2}, "got both frames and percentages"),
        ({-1: 1}, "got a keyframe at -1, expected a frame number from 0, or a percentage"),
        ({"a": 1}, "got a keyframe at a"),
        ({"101%": 1}, "got a keyframe at 101%, expected 0% to 100%"),
        ({0: "much"}, "got 'much', expected 0 or more"),
        (-1, "got -1, expected 0 or more"),
        ([0, float("nan")], "got nan, expected 0 or more"),
        ({0: 1, 16: 0}, "got a keyframe at frame 16, expected 0 to 15"),
        ([1, 0], "got 2 numbers for 16 frames"),
    ],
)
def test_mistakes(raw, message):
    with pytest.raises(UserError, match=message):
        Keyframes.read(raw, least=0).check(16)
