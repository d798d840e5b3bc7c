"""Pictures and video in: what is kept, what is not, and that it goes with everything else."""

import pytest
import torch
from PIL import Image

from animatediff.config.networks import ScheduleConfig
from animatediff.config.request import Windows
from animatediff.diffusion.samplers import SAMPLERS, Steps
from animatediff.diffusion.schedule import NoiseSchedule
from animatediff.features.extend import extension_windows
from animatediff.features.known_frames import KnownFrames, interpolate_ends
from animatediff.features.noise import seeded
from animatediff.utils import UserError

FOX = "a red fox"
CALL = {"num_frames": 4, "height": 16, "width": 16, "num_inference_steps": 5}
VIDEO = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
WELL_SIZED = {"num_frames": 2, "height": 64, "width": 64, "num_inference_steps": 3}  # rounding errors stay small
BIG = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
LEFT = torch.zeros(4, 1, 16, 16)  # paint the left half of the last two frames anew
LEFT[2:, :, :, :8] = 1


@pytest.fixture
def run(pipeline):
    """Latents (b, c, f, h, w) of a small call."""

    def run(prompt=FOX, *, seed=3, **arguments):
        arguments = {"generator": seeded(seed), "output_type": "latent"} | CALL | arguments
        return pipeline(prompt, **arguments).frames

    return run


@pytest.fixture
def encoded(pipeline):
    def encode(video):
        with torch.no_grad():
            return pipeline.model.vae.encode_video(video[None]).transpose(1, 2)

    return encode


# ---- strength -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sampler", [s if s in ("ddim", "euler_a") else pytest.param(s, marks=pytest.mark.slow) for s in SAMPLERS]
)
def test_strength_1_is_without_a_video(run, sampler):
    assert torch.equal(run(sampler=sampler, video=VIDEO, strength=1.0), run(sampler=sampler))


@pytest.mark.slow
@pytest.mark.parametrize("spacing", ["trailing", "karras"])
def test_strength_1_with_windows_and_spacings(run, spacing):
    call = {"windows": Windows(length=3, overlap=1), "timestep_spacing": spacing, "eta": 0.5}
    assert torch.equal(run(video=VIDEO, strength=1.0, **call), run(**call))


def test_strength_0_is_the_video(run, encoded):
    for strength in (0.0, 0.19):  # no whole step of 5
        assert torch.equal(run(video=VIDEO, strength=strength), encoded(VIDEO))


def test_less_strength_keeps_more(run, encoded):
    far = [float((run(video=VIDEO, strength=s) - encoded(VIDEO)).norm()) for s in (0.2, 0.4, 0.6)]
    assert far[0] < far[1] < far[2]


@pytest.mark.parametrize(("strength", "steps"), [(None, 4), (0.5, 2), (0.99, 4), (1.0, 5), (0.0, 0)])
def test_steps_that_run(run, strength, steps):
    """min(int(steps * strength), steps), the last ones; by default 0.8."""
    seen = []
    run(video=VIDEO, strength=strength, callback_on_step_end=lambda *call: seen.append(call[1:3]))
    assert seen == list(enumerate([801, 601, 401, 201, 1][5 - steps :]))


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_every_sampler_starts_in_the_middle(sampler, prediction_type):
    """A denoiser that knows the clip gets it back from any start: its level is the sampler's."""
    schedule = NoiseSchedule(ScheduleConfig(prediction_type=prediction_type))
    timesteps = schedule.timesteps(10)[4:]
    noise, clean = (torch.randn(1, 3, 4, 2, 2, generator=seeded(seed)) for seed in (0, 1))

    def denoise(x, t):
        alpha = schedule.alpha_at(t).reshape(-1, 1, 1, 1, 1)
        return schedule.target(clean, (x - alpha.sqrt() * clean) / (1 - alpha).sqrt(), t)

    x, _ = KnownFrames(clean).begin(noise, schedule=schedule, timesteps=timesteps, all_steps=False)
    assert torch.allclose(x, schedule.add_noise(clean, noise, timesteps[:1]), atol=1e-6)
    back = SAMPLERS[sampler](x, Steps(denoise, schedule, timesteps, noise=lambda: noise))
    assert torch.allclose(back, clean, atol=1e-2 if sampler == "lcm" else 1e-4)


def test_a_share_of_the_start_keeps_its_variance():
    """Whatever its share, data of variance 1 gives latents of variance 1; without any share they are the noise."""
    schedule = NoiseSchedule(ScheduleConfig())
    noise, clean = (torch.randn(1, 3, 4, 64, 64, generator=seeded(seed)) for seed in (0, 1))
    start = KnownFrames(clean, torch.tensor([1.0, 0.5, 0.0]))
    x, _ = start.begin(noise, schedule=schedule, timesteps=torch.tensor([400, 1]), all_steps=False)
    assert x.std(dim=(0, 2, 3, 4)).tolist() == pytest.approx([1, 1, 1], abs=0.03)
    assert torch.equal(x[:, 2], noise[:, 2])


def test_a_batch_is_its_clips(run):
    """Every clip has its own video and its own noise."""
    videos = torch.stack([BIG, BIG.flip(0)])
    for call in ({"strength": 0.6, "eta": 1.0}, {"mask": torch.ones(1, 1, 64, 64).tril()}):
        call |= WELL_SIZED
        both = run([FOX, "snow"], video=videos, generator=[seeded(3), seeded(4)], **call)
        for i, prompt in enumerate((FOX, "snow")):
            assert torch.allclose(both[i : i + 1], run(prompt, seed=3 + i, video=videos[i], **call), atol=1e-3)


# ---- inversion ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_inversion(run, encoded):
    """No noise is drawn, what the video shows matters, and so does the prompt that is animated."""
    call = {"video": VIDEO, "inversion": True, "inversion_prompt": FOX, "guidance_scale": 1.0}
    clip = run(seed=1, **call)
    assert torch.equal(run(seed=2, **call), clip)
    assert not torch.allclose(run(**call | {"inversion_prompt": "snow"}), clip, atol=1e-3)
    assert not torch.allclose(run("snow", **call), clip, atol=1e-3)
    assert torch.equal(run(strength=0.0, **call), encoded(VIDEO))


# ---- masks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sampler", [s if s in ("ddim", "lcm") else pytest.param(s, marks=pytest.mark.slow) for s in SAMPLERS]
)
def test_outside_the_mask_the_video_is_kept(run, encoded, sampler):
    clip = run(video=VIDEO, mask=LEFT, sampler=sampler)
    inside = torch.zeros(1, 1, 4, 2, 2, dtype=torch.bool)
    inside[:, :, 2:, :, :1] = True
    changed = clip != encoded(VIDEO)
    assert torch.equal(changed, inside.expand_as(changed))


@pytest.mark.slow
def test_masks_that_are_white_or_black(run, encoded):
    assert torch.equal(run(video=VIDEO, mask=torch.ones(1, 1, 16, 16)), run())
    assert torch.equal(run(video=VIDEO, mask=torch.zeros(1, 1, 16, 16)), encoded(VIDEO))
    kept = run(video=VIDEO, mask=LEFT, inversion=True)[:, :, :2]
    assert torch.equal(kept, encoded(VIDEO)[:, :, :2])
    windows = run(video=VIDEO, mask=LEFT, windows=Windows(length=3, overlap=1))
    assert torch.equal(windows[:, :, :2], encoded(VIDEO)[:, :, :2])


def test_one_white_pixel_frees_its_latent(run, encoded):
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., 9, 3] = 1
    changed = (run(video=VIDEO, mask=mask) != encoded(VIDEO)).all(dim=1)[0, 0]
    assert changed.tolist() == [[False, False], [True, False]]


# ---- pictures -------------------------------------------------------------------------------------------------


def test_first_and_last_frame_are_the_pictures(run, encoded):
    first, last = encoded(VIDEO[:1])[:, :, 0], encoded(VIDEO[1:2])[:, :, 0]
    clip = run(image=VIDEO[0], last_image=VIDEO[1])
    assert torch.equal(clip[:, :, 0], first) and torch.equal(clip[:, :, -1], last)
    assert torch.equal(run(image=VIDEO[0])[:, :, 0], first) and torch.equal(run(last_image=VIDEO[1])[:, :, -1], last)
    assert not torch.allclose(run(image=VIDEO[0], image_ramp=1.0)[:, :, 1], run(image=VIDEO[0])[:, :, 1], atol=1e-3)


def test_the_ramp_between_two_pictures():
    first, last = torch.zeros(1, 2, 1, 1, 1), torch.ones(1, 1, 1, 1, 1)
    start = interpolate_ends(first, last, 7, ramp=4)
    assert start.clean.flatten().tolist() == pytest.approx([0, 0, 0.2, 0.4, 0.6, 0.8, 1])
    assert start.init_weight.tolist() == [1, 1, 0.75, 0.5, 0.5, 0.75, 1]
    assert start.known_mask.flatten().tolist() == [True, True, False, False, False, False, True]


@pytest.mark.slow
def test_pil_pictures_are_fitted(run):
    pictures = [Image.new("RGB", (40, 20), color) for color in ("red", "blue")]
    red = torch.tensor([1.0, -1, -1]).reshape(3, 1, 1).expand(3, 16, 16)
    assert torch.equal(run(image=pictures[0]), run(image=red))
    assert torch.equal(run(video=pictures, num_frames=2), run(video=torch.stack([red, red.flip(0)]), num_frames=2))
    assert torch.equal(run(video=pictures[0], mask=Image.new("L", (40, 20), 255)), run())


def test_a_single_picture_stands_still(run, encoded):
    assert torch.equal(run(video=VIDEO[:1], strength=0.0), encoded(VIDEO[:1]).expand(1, 4, 4, 2, 2))


# ---- going on -------------------------------------------------------------------------------------------------


def test_links():
    """Every frame is made once, and every window but a short clip's is full and knows enough."""
    assert extension_windows(16, 32, window=16, overlap=4) == [(12, 28), (16, 32)]
    assert extension_windows(1, 20, window=16, overlap=8) == [(0, 16), (4, 20)]
    assert extension_windows(3, 10, window=16, overlap=8) == [(0, 10)]
    for known in (1, 7, 30):
        for frames in (31, 40, 100):
            done = known
            for first, end in extension_windows(known, frames, window=16, overlap=4):
                assert min(done, 4) <= done - first < 16 and end - first == min(16, frames) and end > done
                done = end
            assert done == frames


def test_a_clip_goes_on(run, encoded):
    steps = []
    call = {"video": VIDEO, "extend": 3, "num_inference_steps": 2, "sampler": "euler_ancestral"}
    clip = run(num_frames=20, callback_on_step_end=lambda *call: steps.append(call[1]), **call)
    assert clip.shape == (1, 4, 20, 2, 2) and torch.equal(clip[:, :, :4], encoded(VIDEO)) and clip.isfinite().all()
    assert steps == [0, 1, 2, 3], "two windows of two steps: 1 … 16, 4 … 19"
    at_once = run(num_frames=20, windows=Windows(length=8, overlap=2), **call)
    assert torch.equal(at_once[:, :, :4], encoded(VIDEO))


def test_a_batch_goes_on(run):
    call = {"video": BIG, "extend": 1, "eta": 1.0, **WELL_SIZED, "num_frames": 4}
    both = run([FOX, "snow"], generator=[seeded(3), seeded(4)], **call)
    assert torch.allclose(both[1:], run("snow", seed=4, **call), atol=1e-3)


def test_going_on_is_the_same_as_holding(run):
    """A window of a chain is a clip of which the first frames are masked out."""
    mask = torch.ones(6, 1, 16, 16)
    mask[:4] = 0
    longer = torch.cat([VIDEO, VIDEO[-1:].expand(2, -1, -1, -1)])
    assert torch.equal(run(num_frames=6, video=VIDEO, extend=2), run(num_frames=6, video=longer, mask=mask))


# ---- mistakes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"video": VIDEO, "strength": 1.1}, "strength: got 1.1, expected at most 1"),
        ({"video": VIDEO, "strength": -0.1}, "strength: got -0.1"),
        ({"strength": 0.5}, "strength needs something to start from"),
        ({"mask": LEFT}, "mask needs a video"),
        ({"image": VIDEO[0], "mask": LEFT}, "mask needs a video"),
        ({"inversion": True}, "inversion needs a video"),
        ({"extend": 4}, "extend needs a video"),
        ({"video": VIDEO, "image": VIDEO[0]}, "got both video and image"),
        ({"video": VIDEO, "mask": LEFT, "extend": 2}, "got both extend and mask"),
        ({"video": VIDEO, "inversion": True, "extend": 2}, "got both extend and inversion"),
        ({"video": VIDEO, "extend": 2}, "got 4 frames in all, expected more than the 4"),
        ({"video": VIDEO, "extend": 16, "num_frames": 20}, "extend: got 16 known frames, expected 1 to 15"),
        ({"video": VIDEO, "extend": -1, "num_frames": 20}, "extend: got -1, expected at least 0"),
        ({"video": VIDEO[:3]}, "video: got 3 frames, expected at least 4"),
        ({"video": VIDEO[:0]}, "video: got no values"),
        ({"video": []}, "video: got none, expected at least one picture"),
        ({"video": ["clip.gif"]}, "video: got a str of shape .*, expected PIL images"),
        ({"video": VIDEO[..., :8]}, r"video: got shape \(4, 3, 16, 8\), expected \(f, 3, H, W\) with 16x16"),
        ({"video": VIDEO * 200}, r"video: got no values or some outside the range, expected all in \[-1, 1\]"),
        ({"video": VIDEO, "mask": LEFT[:3]}, "mask: got 3 frames for a video of 4"),
        ({"video": VIDEO, "mask": LEFT[..., :8]}, "mask: got shape"),
        (
            {"video": [Image.new("RGB", (32, 32))], "mask": Image.new("L", (16, 32))},
            "mask: got 16x32 pixels for a video of 32x32",
        ),
        ({"video": "nowhere.gif"}, "video: there is no nowhere.gif"),
        ({"video": torch.stack([VIDEO] * 2)}, "video: got 2 for 1 clips"),
        ({"image": VIDEO[0], "image_ramp": 0}, "image_ramp: got 0"),
        ({"image": [Image.new("RGB", (16, 16))] * 2}, "image: got 2 pictures, expected one"),
        (
            {"image": VIDEO[0], "last_image": VIDEO[1], "num_frames": 1},
            "got image and last_image for a clip of 1 frame",
        ),
        ({"video": VIDEO, "inversion": True, "eta": 0.5}, "inversion: got eta 0.5"),
        ({"video": VIDEO, "inversion": True, "sampler": "lcm"}, "inversion: got the sampler lcm"),
    ],
)
def test_mistakes_are_named(run, arguments, message):
    with pytest.raises(UserError, match=message) as error:
        run(**arguments)
    assert "\n" not in str(error.value)
