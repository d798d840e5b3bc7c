"""Every number of `VideoMetrics` on clips whose answer is known: translations, flicker, loops, cuts, stills."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from animatediff.metrics.block_matching import optical_flow, warp_errors
from animatediff.metrics.video_metrics import (
    VideoMetrics,
    diversity,
    flicker,
    loop_seam,
    measure_video,
    temporal_spectrum,
)
from animatediff.utils import UserError

SIZE = 48
NEED_MOTION = ("direction", "coherence", "evenness")
NEED_CHANGE = ("jump", "seam", "high_frequency", "peak_frequency", *NEED_MOTION)


def texture(height: int, width: int, seed: int = 0) -> Tensor:
    """A soft random picture (3, height, width) in [-0.9, 0.9]."""
    noise = torch.randn(1, 3, height + 8, width + 8, generator=torch.Generator().manual_seed(seed))
    soft = F.avg_pool2d(F.avg_pool2d(noise, 5, stride=1), 5, stride=1)[0]
    return (0.9 * soft / soft.abs().max()).contiguous()


def translated(frames: int, dx: int, dy: int, size: int = SIZE) -> Tensor:
    """A window on a picture that moves by dx, dy (right, down) pixels in every frame, none of its borders in sight."""
    across, down = (frames - 1) * abs(dx), (frames - 1) * abs(dy)
    picture = texture(size + down, size + across)
    left, top = (across if dx > 0 else 0), (down if dy > 0 else 0)
    return torch.stack(
        [picture[:, top - k * dy : top - k * dy + size, left - k * dx : left - k * dx + size] for k in range(frames)]
    )


def still(frames: int) -> Tensor:
    return texture(SIZE, SIZE).expand(frames, -1, -1, -1)


@pytest.mark.parametrize("dx, dy", [(3, 0), (-2, 0), (0, 5), (2, -2)])
def test_a_translation(dx, dy):
    found = measure_video(translated(6, dx, dy))
    assert found.speed == pytest.approx(math.hypot(dx, dy), rel=0.12)  # the border has left the picture
    assert found.top_speed == pytest.approx(math.hypot(dx, dy), rel=0.2)
    off = (found.direction - math.degrees(math.atan2(-dy, dx)) + 180) % 360 - 180
    assert abs(off) < 3
    assert found.coherence > 0.97 and found.evenness > 0.9
    assert found.warp_error < 0.15 * found.change


def test_the_flow_inside_is_exact():
    flow = optical_flow(translated(3, 3, -1))
    inside = flow[..., 3:-3, 3:-3]
    assert (inside - torch.tensor([3.0, -1.0])[:, None, None]).abs().max() < 0.15


def test_motion_below_a_pixel():
    wide = translated(7, 1, 0, size=4 * SIZE)
    found = measure_video(F.avg_pool2d(wide, 4))
    assert found.speed == pytest.approx(0.25, rel=0.25) and found.direction == pytest.approx(0, abs=5)


def test_speed_is_in_pixels_of_the_clip_whatever_its_size():
    small = translated(3, 2, 0)
    large = F.interpolate(small, scale_factor=4, mode="bilinear")
    assert measure_video(large).speed == pytest.approx(4 * measure_video(small).speed, rel=0.05)


def test_a_small_moving_thing_has_a_top_speed():
    video = -torch.ones(6, 3, 64, 64)
    for k in range(6):
        video[k, :, 30:38, 10 + 4 * k : 18 + 4 * k] = 1
    found = measure_video(video)
    assert found.speed < 0.5 and found.top_speed == pytest.approx(4, rel=0.2)


def test_to_and_fro_has_no_direction():
    there = translated(5, 2, 0)
    found = measure_video(torch.cat([there, there.flip(0)[1:]]))
    assert found.coherence < 0.1 and found.speed == pytest.approx(2, rel=0.12)


def test_evenness_of_steady_and_of_shuffled_motion():
    video = translated(8, 2, 0)
    shuffled = video[torch.tensor([3, 0, 6, 1, 5, 2, 7, 4])]
    steady, uneven = measure_video(video), measure_video(shuffled)
    assert steady.evenness > 0.9 and uneven.evenness < 0.2


def test_frames_shown_twice_are_uneven():
    found = measure_video(translated(4, 2, 0).repeat_interleave(2, dim=0))  # steps 0 d 0 d 0 d 0
    assert found.evenness == pytest.approx(0, abs=1e-6) and found.jump == pytest.approx(7 / 3, rel=0.1)


def test_a_picture_that_stands_still():
    found = measure_video(still(8))
    assert (found.change, found.speed, found.top_speed, found.flicker) == (0, 0, 0, 0)
    assert found.warp_error < 1e-6
    assert all(getattr(found, name) is None for name in NEED_CHANGE)


def test_noise_and_changes_of_brightness_are_no_motion():
    noise = 0.05 * torch.randn(5, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    fading = 0.02 * torch.arange(5.0)[:, None, None, None]
    for video in (still(5) + noise, still(5) + fading):
        found = measure_video(video.clamp(-1, 1))
        assert found.speed < 0.01 and found.warp_error == pytest.approx(found.change, rel=0.02)


@pytest.mark.parametrize("cycles, frames", [(8, 16), (4, 16), (2, 16), (3, 15)])
def test_a_sinusoidal_flicker(cycles, frames):
    """The second difference of a sine of frequency v is the sine times -4 sin^2(pi v)."""
    phase = math.pi / 4
    wave = 0.08 * torch.cos(2 * math.pi * cycles / frames * torch.arange(frames) + phase)
    video = (0.9 * still(frames) + wave[:, None, None, None]).contiguous()
    expected = (wave[1:-1] * math.sin(math.pi * cycles / frames) ** 2).abs().mean()
    assert flicker(video) == pytest.approx(float(expected), rel=1e-3)
    found = measure_video(video)
    assert found.peak_frequency == pytest.approx(cycles / frames)
    assert found.high_frequency == pytest.approx(float(cycles / frames > 0.25), abs=0.2)
    assert found.speed < 0.05


def test_alternating_frames_flicker_by_their_amplitude():
    video = torch.zeros(9, 3, 16, 16)
    video[::2], video[1::2] = 0.3, -0.3
    found = measure_video(video)
    assert found.flicker == pytest.approx(0.3) and found.high_frequency > 0.99 and found.change == pytest.approx(0.6)


def test_a_steady_fade_does_not_flicker():
    fade = torch.linspace(-0.8, 0.8, 16)[:, None, None, None].expand(-1, 3, 16, 16)
    found = measure_video(fade)
    assert found.flicker == pytest.approx(0, abs=1e-6) and found.jump == pytest.approx(1, rel=1e-3)
    assert found.high_frequency < 0.01 and found.seam == pytest.approx(15, rel=1e-3)


def test_a_moving_texture_hardly_flickers():
    found = measure_video(translated(8, 2, 0))
    assert found.flicker < 0.1 * found.change


def test_the_spectrum_of_white_noise_is_flat():
    noise = torch.rand(16, 3, 64, 64, generator=torch.Generator().manual_seed(2)) * 2 - 1
    spectrum = temporal_spectrum(noise)
    assert spectrum.shape == (9,) and spectrum[0] == 0 and float(spectrum.sum()) == pytest.approx(1)
    assert spectrum[2:8].numpy() == pytest.approx(2 / 15, rel=0.1)  # the last stands for one frequency, others for two
    assert spectrum[8] == pytest.approx(1 / 15, rel=0.1)


def test_seams():
    picture = texture(32, 32)
    rolling = torch.stack([picture.roll(4 * k, dims=2) for k in range(8)])
    assert loop_seam(rolling) == pytest.approx(1, rel=1e-5)  # the ninth frame would be the first
    assert loop_seam(torch.cat([rolling, rolling[:1]])) == 0
    assert loop_seam(rolling[:4]) > 1.2
    assert loop_seam(still(4)) is None and loop_seam(still(1)) is None


def test_a_cut():
    video = torch.cat([still(5), texture(SIZE, SIZE, seed=9).expand(5, -1, -1, -1)])
    found = measure_video(video)
    assert found.jump == pytest.approx(9) and found.seam == pytest.approx(9)
    assert found.warp_error > 0.5 * found.change


def test_warp_errors_leave_out_what_left_the_picture():
    video = translated(4, 4, 0)
    flow = torch.zeros(3, 2, SIZE // 4, SIZE // 4)
    flow[:, 0] = 4
    assert warp_errors(video, flow).max() < 1e-5
    assert warp_errors(video, torch.zeros_like(flow)).numpy() == pytest.approx(
        [float((video[k + 1] - video[k]).abs().mean()) for k in range(3)], rel=1e-5
    )


@pytest.mark.parametrize("height, width", [(1, 1), (3, 2), (5, 300)])
def test_tiny_and_narrow_clips(height, width):
    video = torch.rand(4, 3, height, width, generator=torch.Generator().manual_seed(3)) * 2 - 1
    found = measure_video(video)
    assert all(math.isfinite(value) for value in vars(found).values() if value is not None)
    assert found.change > 0 and found.seam > 0


def test_a_single_frame_has_no_answers():
    found = measure_video(texture(SIZE, SIZE)[None])
    assert found == VideoMetrics(1, *[None] * (len(vars(found)) - 1))


def test_two_frames():
    found = measure_video(translated(2, 2, 0))
    assert found.speed == pytest.approx(2, rel=0.12) and (found.jump, found.seam) == (1, 1)
    assert (found.evenness, found.flicker) == (None, None)


def test_8_bit_frames_are_measured_as_floats_are():
    floats = translated(4, 2, 0)
    bytes_ = ((floats + 1) * 127.5).round().to(torch.uint8)
    a, b = vars(measure_video(bytes_)), vars(measure_video(bytes_ / 127.5 - 1))
    assert a == pytest.approx(b)
    assert a["change"] == pytest.approx(measure_video(floats).change, rel=0.01)


def test_diversity():
    a, b, c = (torch.full((2, 3, 8, 8), value) for value in (-0.5, 0.0, 0.7))
    assert diversity([a, a]) == 0
    assert diversity([a, b, c]) == pytest.approx((0.5 + 0.7 + 1.2) / 3)
    assert diversity([c, a, b]) == pytest.approx(diversity([a, b, c]))
    with pytest.raises(UserError, match="1 clips"):
        diversity([a])
    with pytest.raises(UserError, match="of one shape"):
        diversity([a, b[:1]])


@pytest.mark.parametrize(
    "video, message",
    [
        (torch.zeros(3, 8, 8), r"shape \(3, 8, 8\)"),
        (torch.zeros(0, 3, 8, 8), "at least one frame"),
        (torch.zeros(2, 8, 8, 3), r"expected \(f, 3, H, W\)"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.int64), "int64"),
        (torch.full((2, 3, 8, 8), torch.nan), "not finite"),
        (torch.full((2, 3, 8, 8), 255.0), r"up to 255, expected floats in \[-1, 1\]"),
    ],
)
def test_refused_clips(video, message):
    with pytest.raises(UserError, match=message):
        measure_video(video)
