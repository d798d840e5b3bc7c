"""Known parts are put back at the level that the sampler is at."""

import pytest
import torch

from animatediff.config.networks import ScheduleConfig
from animatediff.diffusion.samplers import SAMPLERS, Steps, ddim
from animatediff.diffusion.schedule import NoiseSchedule
from animatediff.features.known_frames import noised, restore_known

CONFIGS = {
    "epsilon": {},
    "v, zero SNR": {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
    "noise left": {"set_alpha_to_one": False},
}


def draw(seed):
    return torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


def knowing(schedule, clean):
    """The denoiser of a clip that can only be this one."""

    def denoise(x, t):
        alpha = schedule.alpha_at(t).reshape(-1, 1, 1, 1, 1)
        return schedule.target(clean, (x - alpha.sqrt() * clean) / (1 - alpha).sqrt(), t)

    return denoise


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_what_is_put_back_is_on_ddims_own_path(config):
    """DDIM that knows the clip comes by itself, at every step, where `restore_known` puts it."""
    schedule = NoiseSchedule(ScheduleConfig(**config))
    timesteps, clean, noise = schedule.timesteps(10), draw(0), draw(1)
    restore = restore_known(clean, noise, torch.tensor(True), schedule=schedule, timesteps=timesteps)
    errors = []

    def compare(step, t, x):
        own = x.clone()
        restore(step, t, x)
        errors.append(float((x - own).abs().max()))

    x = noised(clean, noise, float(schedule.alpha_at(timesteps[0])))
    out = ddim(x, Steps(knowing(schedule, clean), schedule, timesteps, callback=compare))
    last = errors.pop()
    assert len(errors) == 9 and max(errors) < 1e-4
    assert last < 1e-4 or not config.get("set_alpha_to_one", True)
    assert torch.equal(out, clean), "the last step ends at clean data, whatever the schedule leaves"


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_rest_is_the_sampler_s(name):
    """Where nothing is known nothing changes, bit for bit; where something is, it is exact at the end."""
    schedule = NoiseSchedule(ScheduleConfig())
    timesteps, clean, noise, start = schedule.timesteps(5), draw(0), draw(1), draw(2)
    known = torch.zeros(1, 3, 1, 8, 8, dtype=torch.bool)
    known[:, 1:, :, :4] = True

    def run(**callback):
        steps = Steps(knowing(schedule, draw(4)), schedule, timesteps, noise=lambda: draw(3), **callback)
        return SAMPLERS[name](start, steps)

    free, both = run(), run(callback=restore_known(clean, noise, known, schedule=schedule, timesteps=timesteps))
    assert torch.equal(both, torch.where(known, clean, free))
