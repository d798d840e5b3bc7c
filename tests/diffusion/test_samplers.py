"""Samplers and timesteps against golden numbers and against the exact denoiser of a Gaussian."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from animatediff.config.networks import ANIMATE_LCM_I2V, ScheduleConfig, distilled_schedule
from animatediff.diffusion.samplers import SAMPLERS, Steps, ddim, dpmpp_2m, find_sampler, lcm, pndm
from animatediff.diffusion.schedule import PREDICTIONS, SPACINGS, NoiseSchedule
from animatediff.utils import UserError

GOLDEN = load_file(Path(__file__).parents[1] / "golden/samplers.safetensors")
DATA_STD = 0.5
ONE_STEP = 1e-3  # from sigma 25 to 0, a difference of two almost equal numbers: rounding is the CPU's own
NOISY = ("euler_ancestral", "lcm")  # the others are deterministic


def video(tensor):
    return tensor.transpose(-4, -3)  # (b, c, f, h, w), as the golden numbers are, and back


def gaussian(schedule, *, std=DATA_STD):
    """The exact denoiser of N(0, std²), of the schedule's prediction type, at rounded timesteps (as in golden runs)."""

    def denoise(x, t):
        alpha = schedule.alpha_at(t.round().long()).reshape(-1, 1, 1, 1, 1)
        clean = alpha.sqrt() * std**2 / (alpha * std**2 + 1 - alpha) * x
        noise = (1 - alpha).sqrt() / (alpha * std**2 + 1 - alpha) * x
        kind = schedule.config.prediction_type
        return {"epsilon": noise, "sample": clean}.get(kind, alpha.sqrt() * noise - (1 - alpha).sqrt() * clean)

    return denoise


def spaced(spacing="leading", betas="linear", **values):
    return NoiseSchedule(ScheduleConfig(timestep_spacing=spacing, beta_schedule=betas, **values))


def start(schedule, timesteps, spacing):
    """Golden starts are scaled by their largest sigma; with leading spacing by sqrt(sigma² + 1), which is 1 here."""
    x = video(GOLDEN["input.x"])
    return x if spacing == "leading" else x * (1 - schedule.alpha_at(timesteps[0])).sqrt()


def assert_close(got, expected, tolerance=1e-5):
    assert (got - expected).abs().max() <= tolerance * expected.abs().max()


EULER_RUNS = [name.split(".")[1:4] for name in GOLDEN if name.startswith("euler.") and name.endswith(".x")]


@pytest.mark.parametrize(("betas", "spacing", "steps"), EULER_RUNS)
def test_euler(betas, spacing, steps):
    name = f"euler.{betas}.{spacing}.{steps}"
    schedule = spaced(spacing, betas)
    timesteps = schedule.timesteps(int(steps))
    assert timesteps.tolist() == GOLDEN[f"{name}.timesteps"].tolist()
    assert_close(schedule.sigmas[timesteps], GOLDEN[f"{name}.sigmas"][:-1])
    assert_close(schedule.timesteps_of(GOLDEN[f"{name}.sigmas"][:-1]), timesteps.float())
    x = SAMPLERS["euler"](start(schedule, timesteps, spacing), Steps(gaussian(schedule), schedule, timesteps))
    assert_close(video(x), GOLDEN[f"{name}.x"], ONE_STEP if steps == "1" else 1e-5)


@pytest.mark.parametrize("betas", ["linear", "scaled_linear"])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_ddim(betas, spacing):
    schedule = spaced(spacing, betas)
    timesteps = schedule.timesteps(10)
    x = ddim(video(GOLDEN["input.x"]), Steps(gaussian(schedule), schedule, timesteps))
    assert_close(video(x), GOLDEN[f"ddim.{betas}.{spacing}.10.x"])


@pytest.mark.parametrize("betas", ["linear", "scaled_linear"])
def test_linspace_ddim_goes_to_the_next_timestep(betas):
    """diffusers steps T // steps down whatever the next timestep is, and so leaves noise in its linspace clips."""
    schedule = spaced("linspace", betas)
    denoise, noise = gaussian(schedule), video(GOLDEN["input.x"])
    timesteps, x = schedule.timesteps(10), noise
    for t in timesteps:
        seen = []
        down = torch.stack([t, t - 100]) if t >= 100 else t[None]
        ddim(x, Steps(denoise, schedule, down, callback=lambda i, t, x, seen=seen: seen.append(x)))
        x = seen[0]
    assert_close(video(x), GOLDEN[f"ddim.{betas}.linspace.10.x"])


def test_dpmpp_2m():
    schedule = spaced()
    timesteps = schedule.custom_timesteps(GOLDEN["dpmpp_2m.linear.10.timesteps"].tolist())
    x = dpmpp_2m(video(GOLDEN["input.x"]), Steps(gaussian(schedule), schedule, timesteps))
    assert_close(video(x), GOLDEN["dpmpp_2m.linear.10.x"])


def test_karras_spacing():
    schedule = spaced("karras")
    timesteps = schedule.timesteps(10)
    assert timesteps.round().tolist() == GOLDEN["dpmpp_2m_karras.linear.10.timesteps"].tolist()
    alpha = schedule.alpha_at(timesteps)
    assert_close(((1 - alpha) / alpha).sqrt(), GOLDEN["dpmpp_2m_karras.linear.10.sigmas"][:-1])
    x = dpmpp_2m(video(GOLDEN["input.x"]), Steps(gaussian(schedule), schedule, timesteps))
    assert_close(video(x), GOLDEN["dpmpp_2m_karras.linear.10.x"], 1e-4)


def test_pndm():
    schedule, seen = spaced(set_alpha_to_one=False), []
    timesteps = schedule.timesteps(10)

    def denoise(x, t):
        seen.append(float(t[0]))
        return gaussian(schedule)(x, t)

    x = pndm(video(GOLDEN["input.x"]), Steps(denoise, schedule, timesteps))
    assert seen == GOLDEN["pndm.linear.10.timesteps"].tolist()
    assert_close(video(x), GOLDEN["pndm.linear.10.x"])


@pytest.mark.parametrize(
    ("steps", "timesteps"), [(4, [999, 749, 499, 249]), (6, [999, 834, 669, 499, 334, 169]), (8, range(999, 0, -125))]
)
def test_lcm_timesteps_of_animatelcm_i2v(steps, timesteps):
    """Its authors' demo: from 200 timesteps, of betas that end at 0.014."""
    config = distilled_schedule(ScheduleConfig(timestep_spacing="lcm"), ANIMATE_LCM_I2V)
    schedule = NoiseSchedule(config)
    assert schedule.timesteps(steps).tolist() == list(timesteps)
    assert schedule.alphas_cumprod[-1].item() == pytest.approx(5.756e-4, rel=1e-3)


@pytest.mark.parametrize("steps", [1, 4, 8])
def test_lcm(steps):
    schedule = spaced("lcm")
    timesteps = schedule.timesteps(steps)
    assert timesteps.tolist() == GOLDEN[f"lcm.linear.{steps}.timesteps"].tolist()
    shape = GOLDEN["input.x"].shape
    draws = iter(torch.randn(shape, generator=torch.Generator().manual_seed(1000 + i)) for i in range(steps))
    run = Steps(gaussian(schedule), schedule, timesteps, noise=lambda: video(next(draws)))
    x = lcm(video(GOLDEN["input.x"]), run)
    assert_close(video(x), GOLDEN[f"lcm.linear.{steps}.x"], ONE_STEP if steps == 1 else 1e-5)
    assert torch.equal(GOLDEN[f"lcm.linear.{steps}.denoised"][-1], GOLDEN[f"lcm.linear.{steps}.x"])


def test_two_steps_at_one_timestep_are_no_division_by_zero():
    schedule = NoiseSchedule(ScheduleConfig(steps_offset=1))
    x = torch.randn(1, 2, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    assert dpmpp_2m(x, Steps(lambda x, t: 0.5 * x, schedule, schedule.timesteps(1000))).isfinite().all()


def test_lcm_ends_without_fresh_noise():
    schedule = NoiseSchedule(ScheduleConfig(set_alpha_to_one=False))

    def no_noise():
        raise AssertionError("the last step draws none")

    lcm(torch.ones(1, 2, 4, 2, 2), Steps(lambda x, t: x, schedule, schedule.timesteps(1), noise=no_noise))


def test_zero_terminal_snr():
    schedule = spaced("trailing", prediction_type="v_prediction", rescale_betas_zero_snr=True)
    assert schedule.alphas_cumprod[-1] == 0
    assert (schedule.alphas_cumprod - GOLDEN["zero_snr.linear.alphas_cumprod"]).abs().max() < 1e-6
    x, timesteps = video(GOLDEN["input.x"]), schedule.timesteps(10)
    for name in set(SAMPLERS) - {"pndm"}:
        generator = torch.Generator().manual_seed(0)
        steps = Steps(
            gaussian(schedule), schedule, timesteps, noise=lambda g=generator: torch.randn(x.shape, generator=g)
        )
        out = SAMPLERS[name](x, steps)
        assert out.isfinite().all() and 0.2 < out.std() < 0.8, name
    with pytest.raises(UserError, match="from which pndm cannot start: use ddim"):
        pndm(x, Steps(gaussian(schedule), schedule, timesteps))
    with pytest.raises(UserError, match="largest sigma is infinite: use trailing"):
        spaced("karras", prediction_type="sample", rescale_betas_zero_snr=True).timesteps(4)
    with pytest.raises(UserError, match="rescale_betas_zero_snr with prediction_type epsilon, expected v_prediction"):
        spaced(rescale_betas_zero_snr=True)


@pytest.mark.parametrize("name", SAMPLERS)
def test_prediction_types_agree(name):
    """The same denoiser told as noise, v or clean data gives the same clip."""
    clips = []
    for kind in PREDICTIONS:
        schedule, generator = spaced(prediction_type=kind), torch.Generator().manual_seed(0)
        x = video(GOLDEN["input.x"])
        steps = Steps(
            gaussian(schedule),
            schedule,
            schedule.timesteps(8),
            noise=lambda x=x, generator=generator: torch.randn(x.shape, generator=generator),
        )
        clips.append(SAMPLERS[name](x, steps))
    for other in clips[1:]:
        assert_close(other, clips[0], 1e-4)


def std_at(schedule, t):
    """Of x_t of N(0, s²) data. The probability flow takes x_t to x_t' in proportion to it."""
    alpha = schedule.alpha_at(t)
    return (alpha * DATA_STD**2 + 1 - alpha).sqrt()


@pytest.mark.parametrize("name", [name for name in SAMPLERS if name not in NOISY])
def test_deterministic_samplers_converge(name):
    """To the exact solution of the probability flow, and those of higher order faster."""
    schedule = spaced("karras", set_alpha_to_one=False)  # up to t = 0: the jump from there is of first order for all
    x = torch.ones(1, 1, 1, 1, 1)

    def exactly(x, t):  # at fractional timesteps too
        alpha = schedule.alpha_at(t).reshape(-1, 1, 1, 1, 1)
        return (1 - alpha).sqrt() / (alpha * DATA_STD**2 + 1 - alpha) * x

    def error(steps):
        timesteps = schedule.timesteps(steps)
        out = SAMPLERS[name](x, Steps(exactly, schedule, timesteps))
        exact = std_at(schedule, torch.tensor(0)) / std_at(schedule, timesteps[0])
        return abs(float(out / exact) - 1)

    assert error(80) < error(40) < error(20)
    assert error(40) < (0.05 if name in ("ddim", "euler") else 0.005)


@pytest.mark.parametrize("name", NOISY)
def test_noisy_samplers_draw_from_the_distribution(name):
    schedule, generator = spaced("trailing"), torch.Generator().manual_seed(0)
    x = torch.randn(1, 40_000, 1, 1, 1, generator=generator)

    def noise():
        return torch.randn(x.shape, generator=generator)

    # A consistency model maps x to the end of its flow; here that is known exactly.
    def consistent(x, t):
        return DATA_STD / std_at(schedule, t).reshape(-1, 1, 1, 1, 1) * x

    timesteps = schedule.timesteps(500 if name == "euler_ancestral" else 4)
    if name == "lcm":
        schedule = spaced("trailing", prediction_type="sample")
    denoise = consistent if name == "lcm" else gaussian(schedule)
    out = SAMPLERS[name](x, Steps(denoise, schedule, timesteps, noise))
    assert abs(out.std() / DATA_STD - 1) < 0.03 and abs(out.mean()) < 0.01


def test_euler_ancestral_is_karras_formula():
    """sigma_up, sigma_down and the step written in x / sqrt(abar), as k-diffusion has them."""
    schedule = spaced()
    timesteps, denoise = schedule.timesteps(6), gaussian(schedule)
    noises = torch.randn(6, *video(GOLDEN["input.x"]).shape, generator=torch.Generator().manual_seed(0))
    sigmas = [*schedule.sigmas[timesteps].tolist(), 0.0]
    x = video(GOLDEN["input.x"]) * math.sqrt(sigmas[0] ** 2 + 1)
    for i, t in enumerate(timesteps):
        now, after = sigmas[i], sigmas[i + 1]
        epsilon = denoise(x / math.sqrt(now**2 + 1), t[None])
        up = min(after, math.sqrt(after**2 * (now**2 - after**2) / now**2))
        x = x + epsilon * (math.sqrt(after**2 - up**2) - now) + noises[i] * up
    draws = iter(noises)
    steps = Steps(denoise, schedule, timesteps, noise=lambda: next(draws))
    ours = SAMPLERS["euler_ancestral"](video(GOLDEN["input.x"]), steps)
    assert_close(ours, x)


@pytest.mark.parametrize("name", [name for name in SAMPLERS if name not in ("dpmpp_2m", "pndm")])
def test_a_sampler_goes_on_where_it_stopped(name):
    """From the latents that the callback saw; only the multistep samplers remember more."""
    schedule = spaced()
    timesteps, seen = schedule.timesteps(5), []
    sampler, x = SAMPLERS[name], video(GOLDEN["input.x"])
    steps = Steps(gaussian(schedule), schedule, timesteps, noise=lambda: torch.full_like(x, 0.1))
    whole = sampler(x, replace(steps, callback=lambda *step: seen.append(step)))
    assert [step[:2] for step in seen] == list(enumerate(timesteps.tolist()))
    assert torch.equal(sampler(seen[2][2], replace(steps, timesteps=timesteps[3:])), whole)


@pytest.mark.parametrize("name", SAMPLERS)
def test_clip_sample(name):
    """Every prediction of clean data is held within [-1, 1]; the noise is the predicted one (pndm sees no other)."""
    x, clips = 5 * video(GOLDEN["input.x"]), []
    for clip_sample in (False, True):
        schedule = spaced(clip_sample=clip_sample)
        denoise, timesteps = gaussian(schedule, std=5.0), schedule.timesteps(5)
        clips.append(SAMPLERS[name](x, Steps(denoise, schedule, timesteps, noise=lambda: 0 * x)))
    if name == "pndm":
        assert torch.equal(*clips)
    else:
        assert clips[0].abs().max() > 5 and clips[1].abs().max() <= 1


def test_clipped_ddim_step():
    """sqrt(abar') clip(x_0) + sqrt(1 - abar') noise: the official code does not recompute the noise."""
    schedule, seen = spaced(clip_sample=True), []
    x, t = 5 * video(GOLDEN["input.x"]), torch.tensor([601, 401])
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    ddim(x, Steps(lambda x, t: noise, schedule, t, callback=lambda *step: seen.append(step[2])))
    abar, abar_next = schedule.alphas_cumprod[t].tolist()
    clean = ((x - (1 - abar) ** 0.5 * noise) / abar**0.5).clamp(-1, 1)
    assert_close(seen[0], abar_next**0.5 * clean + (1 - abar_next) ** 0.5 * noise)


def test_names_and_noise():
    with pytest.raises(UserError, match="unknown sampler 'eulr', the nearest known one is 'euler': .*all: ddim, euler"):
        find_sampler("eulr")
    with pytest.raises(UserError, match="got eta 0.5 with the sampler pndm, expected 0: only ddim"):
        find_sampler("pndm", eta=0.5)
    schedule = spaced()
    steps = Steps(gaussian(schedule), schedule, schedule.timesteps(2))
    for sampler in (find_sampler("ddim", eta=0.5), find_sampler("euler_ancestral"), lcm):
        with pytest.raises(ValueError, match="give `noise`"):
            sampler(video(GOLDEN["input.x"]), steps)


@pytest.mark.parametrize("spacing", SPACINGS)
def test_timesteps_fall_within_the_schedule(spacing):
    schedule = spaced(spacing)
    for steps in (1, 2, 3, 7, 30, 50, 100):
        timesteps = schedule.timesteps(steps)
        assert len(timesteps) == steps and (timesteps.diff() < 0).all()
        assert timesteps[-1] >= 0 and timesteps[0] <= 999
        if spacing != "leading":
            assert timesteps[0] == 999 or (spacing == "linspace" and steps == 1)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"beta_start": 0.0}, "got beta_start 0.0 and beta_end 0.012, expected 0 <"),
        ({"beta_start": float("nan")}, "beta_start: got nan, expected a number"),
        ({"beta_start": 0.1}, "expected 0 < beta_start <= beta_end < 1"),
        ({"beta_end": 10**400}, "beta_end: got 1000000000"),
        ({"beta_start": 1e-30, "beta_end": 1e-30}, "leave no noise at the first"),
        ({"beta_start": 0.9, "beta_end": 0.9}, "leave no signal at the last"),
        ({"num_train_timesteps": 1}, "got num_train_timesteps 1, expected 2 to 100000"),
        ({"num_train_timesteps": 10**9}, "got num_train_timesteps 1000000000, expected"),
        ({"steps_offset": -1}, "got steps_offset -1, expected 0 to 999"),
        ({"steps_offset": 10**400}, "expected 0 to 999"),
    ],
)
@pytest.mark.parametrize("betas", ["linear", "scaled_linear"])
def test_numbers_that_make_no_schedule(values, message, betas):
    with pytest.raises(UserError, match=message):
        spaced(betas=betas, **values)


def test_custom_timesteps_and_sigmas():
    schedule = spaced()
    assert schedule.custom_timesteps([999, 500.0, 1]).tolist() == [999, 500, 1]
    assert schedule.custom_timesteps([999, 1]).dtype == torch.int64
    assert schedule.custom_timesteps([10.5, 0]).tolist() == [10.5, 0.0]
    for wrong in ([], [1, 2], [5, 5], [1000, 3], [3, -1]):
        with pytest.raises(UserError, match="expected falling numbers from at most 999 to at least 0"):
            schedule.custom_timesteps(wrong)
    fractional = torch.tensor([998.25, 500.5, 0.125])
    alpha = schedule.alpha_at(fractional).double()
    assert_close(schedule.timesteps_of(((1 - alpha) / alpha).sqrt()), fractional, 1e-5)
    for sigma in (26.0, 0.02):
        with pytest.raises(UserError, match=f"got sigma {sigma:g}, expected 0.02917 to 25.15"):
            schedule.timesteps_of([1.0, sigma])
    with pytest.raises(UserError, match="got 101 steps, expected 1 to 100"):
        spaced("lcm").timesteps(101)
    with pytest.raises(UserError, match="got timestep_spacing 'tailing', expected one of leading"):
        spaced("tailing")
