"""Windows of frames: whatever the schedule and the length, all frames are covered, none twice, and weights sum to 1."""

import itertools

import pytest
import torch

from animatediff.config.networks import ScheduleConfig
from animatediff.config.request import Windows
from animatediff.config.spellings import build_request
from animatediff.diffusion.guidance import classifier_free_guidance
from animatediff.diffusion.samplers import Steps, ddim, pndm
from animatediff.diffusion.schedule import NoiseSchedule
from animatediff.features.looping import rotate_loop
from animatediff.features.windows import (
    FUSIONS,
    SCHEDULES,
    full_clip,
    sliding_windows,
    van_der_corput,
    window_weights,
    windows_of_step,
)
from animatediff.utils import UserError

LENGTHS = range(17, 161)
SETTINGS = [(16, 4), (15, 0)]  # (length, overlap)
STEPS = 5
TIMESTEPS = torch.tensor([900, 600, 300, 1])


def test_halving():
    assert [van_der_corput(k) for k in range(9)] == [0, 0.5, 0.25, 0.75, 0.125, 0.625, 0.375, 0.875, 0.0625]


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_frame_is_covered_and_none_twice(schedule, stride):
    if stride > 1 and schedule != "uniform":
        with pytest.raises(UserError, match=f"windows.stride: got {stride}, expected 1, or more with .*uniform"):
            build_request({"prompt": "a", "windows": {"schedule": schedule, "stride": stride}}, where="")
        return
    for (length, overlap), frames, step in itertools.product(SETTINGS, LENGTHS, range(STEPS)):
        windows = windows_of_step(Windows(schedule, length, overlap, stride=stride), step, frames)
        assert set(itertools.chain(*windows)) == set(range(frames)), (length, overlap, frames, step)
        assert all(len(window) == length == len(set(window)) for window in windows)
        assert len(set(windows)) == len(windows)


@pytest.mark.parametrize("schedule", ["open", "static"])
def test_open_windows_never_wrap(schedule):
    for (length, overlap), frames, step in itertools.product(SETTINGS, LENGTHS, range(STEPS)):
        windows = windows_of_step(Windows(schedule, length, overlap), step, frames)
        assert all(window == tuple(range(window[0], window[0] + length)) for window in windows)
        starts = [window[0] for window in windows]
        assert starts == sorted(starts) and starts[0] == 0 and starts[-1] == frames - length
        assert all(b - a <= length - overlap for a, b in itertools.pairwise(starts)), "neighbours overlap"


def test_closed_windows_are_one_loop_turned():
    for (length, overlap), frames, step in itertools.product(SETTINGS, LENGTHS, range(STEPS)):
        windows = Windows("closed", length, overlap)
        turn = round(frames / len(windows_of_step(windows, 0, frames)) * van_der_corput(step))
        turned = {tuple((frame + turn) % frames for frame in window) for window in windows_of_step(windows, 0, frames)}
        assert set(windows_of_step(windows, step, frames)) == turned
    crossing = [w for w in windows_of_step(Windows("closed"), 0, 32) if (31, 0) in itertools.pairwise(w)]
    assert crossing, "some window holds the seam"


@pytest.mark.parametrize("schedule", ["open", "closed"])
def test_the_phase_moves_at_every_step(schedule):
    """No two of eight steps in a row begin all their windows in the same places."""
    for frames in LENGTHS:
        if frames < 24 and schedule == "open":  # little room between the first window and the last
            continue
        steps = [frozenset(windows_of_step(Windows(schedule), step, frames)) for step in range(8)]
        assert all(a != b for a, b in itertools.pairwise(steps)), frames
    assert len({windows_of_step(Windows("static"), step, 64)[1] for step in range(8)}) == 1


def test_known_windows():
    """The peers' uniform, their static, and the open schedule, for 32 frames."""

    def ends(schedule, step, frames=32):
        return [(window[0], window[-1]) for window in windows_of_step(Windows(schedule), step, frames)]

    assert [ends("uniform", k) for k in range(3)] == [
        [(0, 15), (12, 27), (24, 7)],
        [(16, 31), (28, 11), (8, 23)],
        [(8, 23), (20, 3), (0, 15)],
    ]
    assert ends("static", 5) == [(0, 15), (12, 27), (16, 31)]
    assert ends("static", 5, 48) == [(0, 15), (12, 27), (24, 39), (32, 47)]
    assert [[start for start, _ in ends("open", k)] for k in range(3)] == [[0, 12, 16], [0, 6, 16], [0, 9, 16]]


@pytest.mark.parametrize("frames", [1, 5, 16])
def test_short_clips(frames):
    """One window; a closed clip has two, each half a turn from the other, so that its seam is seen."""
    for schedule in ("open", "static", "uniform"):
        assert windows_of_step(Windows(schedule), 3, frames) == [tuple(range(frames))]
    assert len(windows_of_step(Windows("closed"), 0, frames)) == min(2, frames)
    assert all(sorted(window) == list(range(frames)) for window in windows_of_step(Windows("closed"), 0, frames))


@pytest.mark.parametrize("fuse", FUSIONS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_weights_are_a_partition_of_unity(schedule, fuse):
    """A denoiser that says 1 everywhere says so through windows, at any length and step."""
    for (length, overlap), frames in itertools.product(SETTINGS, [17, 31, 32, 77, 160]):
        windows = Windows(schedule, length, overlap, fuse)
        for window in windows_of_step(windows, 1, frames):
            weights = window_weights(windows, window, frames)
            assert weights.shape == (length,) and (weights > 0).all()
        for t in TIMESTEPS[:2]:
            ones = sliding_windows(lambda x, t, frames: torch.ones_like(x), windows, TIMESTEPS)(
                torch.zeros(1, frames, 1, 1, 1), t[None]
            )
            assert torch.allclose(ones, torch.ones_like(ones), atol=1e-6)


def test_weights():
    assert window_weights(Windows(length=4, overlap=1), (4, 5, 6, 7), 20).tolist() == [1, 2, 2, 1]
    assert window_weights(Windows(length=5, overlap=1), (4, 5, 6, 7, 8), 20).tolist() == [1, 2, 3, 2, 1]
    linear = Windows("open", 5, 1, "overlap-linear")
    assert window_weights(linear, (4, 5, 6, 7, 8), 20).tolist() == [0.5, 1, 1, 1, 0.5]
    assert window_weights(linear, (0, 1, 2, 3, 4), 20).tolist() == [1, 1, 1, 1, 0.5]
    assert window_weights(linear, (15, 16, 17, 18, 19), 20).tolist() == [0.5, 1, 1, 1, 1]
    assert window_weights(Windows("closed", 5, 1, "overlap-linear"), (0, 1, 2, 3, 4), 20)[0] == 0.5
    bell = window_weights(Windows("open", 6, 1, "gaussian"), (4, 5, 6, 7, 8, 9), 20)
    assert torch.allclose(bell, torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5]).square().mul(-0.5).exp())


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_frame_wise_denoiser_does_not_notice(schedule):
    """Windows change nothing where frames do not know each other, whatever the sampler and the guidance."""
    schedule_ = NoiseSchedule(ScheduleConfig())
    timesteps = schedule_.timesteps(4)

    def framewise(x, t):
        return torch.tanh(x) / torch.arange(1, len(x) + 1).reshape(-1, 1, 1, 1, 1)

    x = torch.randn(1, 37, 2, 2, 2, generator=torch.Generator().manual_seed(0))
    cut = sliding_windows(lambda x, t, frames: framewise(x, t), Windows(schedule), timesteps)
    for sampler, scale in itertools.product((ddim, pndm), (0.5, 1.0, 7.5)):
        whole, parts = (
            sampler(x, Steps(classifier_free_guidance(denoise, scale), schedule_, timesteps))
            for denoise in (framewise, cut)
        )
        assert torch.allclose(parts, whole, rtol=1e-4, atol=1e-4)


def test_what_the_network_sees():
    """Windows of one length, one at a time, at the step's phase; overlaps are means of what the windows say."""
    seen = []

    def denoise(x, t, frames):
        seen.append(x[0, :, 0, 0, 0].int().tolist())
        assert frames.tolist() == seen[-1]
        return x * 0 + len(seen)

    windows = Windows("open", 8, 4, "flat")
    x = torch.arange(20.0).reshape(1, 20, 1, 1, 1)
    cut = sliding_windows(denoise, windows, TIMESTEPS)
    out = cut(x, TIMESTEPS[2:3])[0, :, 0, 0, 0]
    assert [tuple(frames) for frames in seen] == windows_of_step(windows, 2, 20)
    for frame in range(20):
        said = [i for i, window in enumerate(windows_of_step(windows, 2, 20), 1) if frame in window]
        assert out[frame] == pytest.approx(sum(said) / len(said))
    first = list(seen)
    seen.clear()
    cut(x, TIMESTEPS[:1])
    assert seen != first, "another step, other windows"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"schedule": "looped"}, "windows.schedule: got 'looped', expected open or closed or static or uniform"),
        ({"fuse": "pyramide"}, "windows.fuse: got 'pyramide', expected flat or pyramid"),
        ({"length": -1}, "windows.length: got -1"),
        ({"overlap": 16}, "windows.overlap: got 16, expected 0 to 15"),
        ({"overlap": -1}, "windows.overlap: got -1"),
        ({"stride": 0}, "windows.stride: got 0"),
    ],
)
def test_mistakes_are_named(values, message):
    with pytest.raises(UserError, match=message):
        build_request({"prompt": "a", "windows": values}, where="")


def test_rotation():
    """All frames together, beginning with another one at each step; every frame gets its own prediction."""
    firsts = []

    def denoise(x, t, frames):
        assert torch.equal(x[0, :, 0, 0, 0], frames.float())
        firsts.append(int(frames[0]))
        return 2 * x

    x = torch.arange(16.0).reshape(1, 16, 1, 1, 1)
    for t in TIMESTEPS:
        assert torch.equal(rotate_loop(denoise, TIMESTEPS)(x, t[None]), 2 * x)
    assert firsts == [0, 8, 4, 12]


def test_a_part_of_a_clip_knows_its_place():
    seen = []
    denoise = full_clip(lambda x, t, frames: seen.append(frames.tolist()) or x, 5)
    denoise(torch.zeros(1, 3, 1, 1, 1), torch.zeros(1))
    assert seen == [[5, 6, 7]]
