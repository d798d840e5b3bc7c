"""The networks, samplers and LoRAs against numbers that the official implementation produced."""

from pathlib import Path

import pytest
import torch
from einops import rearrange
from safetensors.torch import load_file

from animatediff.checkpoints.load import ImageModel, load_base, load_motion_module
from animatediff.checkpoints.lora_files import read_lora
from animatediff.config.networks import ScheduleConfig
from animatediff.diffusion.guidance import classifier_free_guidance
from animatediff.diffusion.samplers import Steps, ddim
from animatediff.diffusion.schedule import NoiseSchedule
from animatediff.models.lora import LoRAStack
from animatediff.models.unet import UNet
from tests.nano import write_files

GOLDEN = load_file(Path(__file__).parents[1] / "golden/nano/expected.safetensors")
VERSIONS = ("v1", "v2", "v3")
TOLERANCE = 1e-5  # relative; `test_rounding.py` shows that rounding in float32 does as much
LORAS = [("v2", "motion_lora", 0.7, "lora.motion_v2_a0.7"), ("v3", "adapter", 1.0, "lora.adapter_v3_a1.0")]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    return write_files(tmp_path_factory.mktemp("nano"))


@pytest.fixture(scope="module")
def base(files) -> ImageModel:
    return load_base(files / "nano.safetensors")


@pytest.fixture(scope="module")
def unets(files, base) -> dict[str, UNet]:
    return {v: load_motion_module(base.unet, files / f"mm_{v}.safetensors")[0] for v in VERSIONS}


def golden(name: str) -> torch.Tensor:
    """An expected video, (b, c, f, h, w) in the file, as (b, f, c, h, w)."""
    return rearrange(GOLDEN[name], "b c f h w -> b f c h w")


def assert_close(got: torch.Tensor, expected: torch.Tensor, relative: float = TOLERANCE) -> None:
    error = ((got - expected).norm() / expected.norm()).item()
    assert error < relative, f"relative error {error:.2e}"


@torch.no_grad()
def predict(unet: UNet, t: int = 481, context: torch.Tensor = GOLDEN["text.last_hidden_state"]) -> torch.Tensor:
    return unet(golden("input.latents"), torch.tensor([t, t]), context)


@torch.no_grad()
def test_vae(base):
    mean, logvar = base.vae.encode(GOLDEN["input.image"])
    assert_close(mean, GOLDEN["vae.mean"])
    assert_close(logvar, GOLDEN["vae.logvar"])
    assert_close(base.vae.decode(GOLDEN["input.latents"][:, :, 0]), GOLDEN["vae.decode"])


def test_image_model(base):
    assert_close(predict(base.unet), golden("unet.image"))


@pytest.mark.parametrize("t", [1, 481, 981])
@pytest.mark.parametrize("version", VERSIONS)
def test_video_model(unets, version, t):
    assert_close(predict(unets[version], t), golden(f"unet.{version}.t{t}"))


@pytest.mark.parametrize("version", [v if v == "v3" else pytest.param(v, marks=pytest.mark.slow) for v in VERSIONS])
@torch.no_grad()
def test_guided_ddim_run(unets, version):
    schedule = NoiseSchedule(ScheduleConfig())
    text = GOLDEN["text.last_hidden_state"].flip(0)  # in these runs entry 1 is the unconditional one
    denoise = classifier_free_guidance(lambda x, t: unets[version](x, t, text), 7.5)
    x = ddim(golden("input.noise"), Steps(denoise, schedule, schedule.timesteps(10)))
    assert_close(x, golden(f"pipeline.{version}.latents"), 1e-4)


@torch.no_grad()
def test_decoded_frames(base):
    frames = base.vae.decode_video(golden("pipeline.v3.latents"), chunk_frames=2)
    assert_close((frames / 2 + 0.5).clamp(0, 1), golden("pipeline.v3.frames"))


@pytest.mark.parametrize(("version", "file", "scale", "name"), LORAS)
@pytest.mark.parametrize("merged", [False, True])
def test_lora_of_the_unet(unets, files, version, file, scale, name, merged):
    stack = LoRAStack(unets[version])
    stack.add(read_lora(files / f"{file}.safetensors"), scale)
    if merged:
        stack.merge()
    assert_close(predict(unets[version]), golden(name))
    stack.clear()
    assert_close(predict(unets[version]), golden(f"unet.{version}.t481"))


@torch.no_grad()
def test_kohya_lora_of_text_encoder_and_unet(unets, base, files):
    stack = LoRAStack(unets["v3"], base.text_encoder)
    stack.add(read_lora(files / "kohya.safetensors"), 0.6)
    context = base.text_encoder(GOLDEN["input.token_ids"])
    assert_close(context, GOLDEN["lora.kohya_a0.6.text"])
    assert_close(predict(unets["v3"], context=context), golden("lora.kohya_a0.6.unet"))
    stack.clear()


@pytest.mark.parametrize("betas", ["linear", "scaled_linear"])
def test_schedule_and_ddim(betas):
    schedule = NoiseSchedule(ScheduleConfig(beta_schedule=betas))
    assert_close(schedule.alphas_cumprod, GOLDEN[f"ddim.{betas}.alphas_cumprod"], 1e-6)
    for steps in (1, 5, 10, 25, 50):
        assert schedule.timesteps(steps).tolist() == GOLDEN[f"ddim.timesteps.{steps}"].tolist()
    eps = golden("input.ddim_eps")
    x = ddim(golden("input.ddim_x"), Steps(lambda x, t: eps, schedule, schedule.timesteps(10)))
    assert_close(x, golden(f"ddim.{betas}.trajectory10"), 1e-6)


@pytest.mark.parametrize(
    ("name", "eta", "prediction"), [("eta05", 0.5, "epsilon"), ("v_prediction", 0, "v_prediction")]
)
def test_single_ddim_steps(name, eta, prediction):
    for betas in ("linear", "scaled_linear"):
        if f"ddim.{betas}.{name}" not in GOLDEN:
            continue
        schedule = NoiseSchedule(ScheduleConfig(beta_schedule=betas, prediction_type=prediction))
        seen = []
        steps = Steps(
            lambda x, t: golden("input.ddim_eps"),
            schedule,
            schedule.timesteps(10)[3:],  # the first step of the run is the fourth of ten
            noise=lambda: golden("input.ddim_noise"),
            callback=lambda step, t, x, seen=seen: seen.append(x.clone()),
        )
        ddim(golden("input.ddim_x"), steps, eta=eta)
        assert_close(seen[0], golden(f"ddim.{betas}.{name}"), 1e-6)
