"""Prompts between keyframes: exact at keys, a closed form between them, loops without a seam."""

import pytest
import torch

from animatediff.config.request import Travel
from animatediff.features.prompt_travel import FrameContext, join, text_of_frames, travel_context
from animatediff.utils import UserError

FRAMES, KEYS = 40, [3, 10, 11, 37]
ALL = torch.arange(FRAMES)
TRAVELS = [Travel(way, loop, ratio) for way in ("lerp", "slerp") for loop in (False, True) for ratio in (0.0, 0.3)]


def texts(count=4, *, norm=None) -> torch.Tensor:
    e = torch.randn(count, 5, 8, generator=torch.Generator().manual_seed(0))
    return e if norm is None else norm * e / e.flatten(1).norm(dim=1)[:, None, None]


@pytest.mark.parametrize("travel", TRAVELS, ids=str)
def test_keyframes_have_exactly_their_text(travel):
    mixed = travel_context(travel, texts(), KEYS, FRAMES).at(ALL)
    assert mixed.shape == (1, FRAMES, 5, 8)
    assert torch.equal(mixed[0, KEYS], texts())


@pytest.mark.parametrize("travel", TRAVELS, ids=str)
def test_every_frame_is_a_mixture_of_two_texts(travel):
    (weights,) = travel_context(travel, texts(), KEYS, FRAMES).weights
    assert (weights >= 0).all() and ((weights > 0).sum(1) <= 2).all()
    if travel.interpolation == "lerp":
        assert torch.allclose(weights.sum(1), torch.ones(FRAMES))


def test_lerp_is_even():
    """Nothing compounds: half of the way is half of both."""
    (weights,) = travel_context(Travel(), texts(2), [0, 8], 9).weights
    assert torch.equal(weights[:, 0], torch.arange(8, -1, -1) / 8)


def test_open_ends_hold():
    mixed = travel_context(Travel("slerp", loop=False), texts(), KEYS, FRAMES).at(ALL)[0]
    assert (mixed[:3] == texts()[0]).all() and (mixed[37:] == texts()[-1]).all()


def test_a_loop_has_no_seam():
    """It goes on evenly over the end of the clip, and where the clip begins does not matter."""
    (weights,) = travel_context(Travel(loop=True), texts(), KEYS, FRAMES).weights
    gap = KEYS[0] + FRAMES - KEYS[-1]
    assert torch.allclose((weights[0] - weights[-1])[[0, 3]], torch.tensor([1 / gap, -1 / gap]))
    (turned,) = travel_context(Travel(loop=True), texts(), [frame - 3 for frame in KEYS], FRAMES).weights
    assert torch.allclose(turned, weights.roll(-3, 0))


def test_the_windows_say_whether_it_loops():
    def mix(travel, loop):
        return travel_context(travel, texts(), KEYS, FRAMES, loop=loop).weights

    assert torch.equal(mix(Travel(), True), mix(Travel(loop=True), False))
    assert torch.equal(mix(Travel(loop=False), True), mix(Travel(), False))
    assert not torch.equal(mix(Travel(), True), mix(Travel(), False))


def test_slerp_keeps_the_norm_and_turns_evenly():
    mixed = travel_context(Travel("slerp"), texts(2, norm=3.0), [0, 10], 11).at(torch.arange(11))[0].flatten(1)
    assert torch.allclose(mixed.norm(dim=1), torch.full((11,), 3.0))
    turns = (mixed[1:] * mixed[:-1]).sum(1) / 9
    assert torch.allclose(turns, turns[:1].expand(10), atol=1e-6)
    same = travel_context(Travel("slerp"), texts(1).expand(2, -1, -1), [0, 10], 11).at(torch.arange(11))[0]
    assert torch.allclose(same, texts(1).expand(11, -1, -1), atol=1e-6)


def test_the_fixed_part_of_an_interval():
    (weights,) = travel_context(Travel(fixed_ratio=0.5), texts(2), [0, 8], 9).weights
    assert weights[:, 1].tolist() == [0, 0, 0, 0, 0, 0.25, 0.5, 0.75, 1]


def test_one_keyframe_is_a_plain_prompt():
    for loop in (False, True):
        mixed = travel_context(Travel(loop=loop), texts(1), [7], FRAMES).at(ALL)
        assert torch.equal(mixed[0], texts(1).expand(FRAMES, -1, -1))


def test_any_frames_in_any_order():
    context = travel_context(Travel(), texts(), KEYS, FRAMES)
    window = torch.tensor([39, 0, 1, 20])
    assert torch.equal(context.at(window), context.at(ALL)[:, window])


def test_joined_clips_are_the_clips():
    one, two = travel_context(Travel(), texts(2), [0, 9], 10), travel_context(Travel("slerp"), texts(3), [1, 4, 8], 10)
    both = join([one, two])
    assert len(both.keys) == 5 and both.weights.shape == (2, 10, 5)
    frames = torch.arange(10)
    assert torch.allclose(both.at(frames), torch.cat([one.at(frames), two.at(frames)]))


def test_text_of_frames():
    like, frames = torch.zeros(1, dtype=torch.float64), torch.tensor([4, 5])
    plain = text_of_frames([texts(2), texts(3)], like=like)(frames)
    assert plain.dtype == torch.float64 and torch.equal(plain, torch.cat([texts(2), texts(3)]).double())
    context = travel_context(Travel(), texts(2), [0, 9], 10)
    both = text_of_frames([context, context], like=like)(frames)
    assert both.shape == (2, 2, 5, 8) and torch.allclose(both[1], context.at(frames)[0].double())
    assert isinstance(context, FrameContext) and context.keys.dtype == torch.float32


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"interpolation": "slurp"}, "interpolation: got 'slurp', expected lerp or slerp"),
        ({"fixed_ratio": 1.0}, "fixed_ratio: got 1.0, expected less than 1"),
    ],
)
def test_mistakes_are_named(values, message):
    with pytest.raises(UserError, match=message):
        Travel(**values)
