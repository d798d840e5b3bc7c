"""The golden numbers of every family through its files and the command line.

The sampler is replaced by one that asks once, for the golden latents; the prompt by the golden text embedding. All else
is a run of `scripts/animate.py`: options, files, networks, features.
"""

from pathlib import Path

import pytest
import torch
from einops import rearrange
from torch import Tensor

from animatediff.features import image_to_video as i2v_feature
from animatediff.features import pia as pia_feature
from scripts.animate import main
from tests import control
from tests.families import FOLDER, expected
from tests.features.test_picture_features import CONTEXT, adapter, folder, net  # noqa: F401
from tests.models.test_golden import GOLDEN, assert_close
from tests.models.test_lora_algorithms import EXPECTED, FILES, NANO, written
from tests.nano import entry, write_config

LATENTS = rearrange(GOLDEN["input.latents"], "b c f h w -> b f c h w")


def of_families(family: str, name: str) -> Tensor:
    return rearrange(expected(family)[name], "b c f h w -> b f c h w")


def with_encoder(f: Path, *adapters: dict) -> dict[str, object]:
    return {"motion_module": "", "ip_adapter": list(adapters), "image_encoder": str(f / "image_encoder")}


FAMILIES = {  # options, and what the network is to predict for both golden clips
    "controlnet": lambda f: (
        {"motion_module": "", "controlnet": net(f, scale=0.8)},
        control.video("control.unet_0.8"),
    ),
    "two controlnets": lambda f: (
        {
            "motion_module": "",
            "controlnet": [net(f, scale=0.8), net(f, "control_b", scale=0.5, images=str(f / "hints_b"))],
        },
        control.video("control.unet_two"),
    ),
    "ip adapter": lambda f: (with_encoder(f, adapter(f, scale=0.6)), control.video("ip.base.unet_0.6")),
    "ip adapters, base and plus": lambda f: (
        with_encoder(f, adapter(f, scale=0.6), adapter(f, "plus", scale=0.3, images=str(f / "b.png"))),
        control.video("ip.unet_base_and_plus"),
    ),
    "pia": lambda f: (
        {
            "motion_module": str(f / "pia.safetensors"),
            "pia": {"image": str(f / "a.png"), "motion": "large", "style_transfer": True},
        },
        of_families("pia", "unet.mask6"),
    ),
    "animatelcm-i2v": lambda f: (
        {"motion_module": str(f / "i2v.safetensors"), "i2v": {"image": str(f / "a.png")}},
        of_families("animatelcm_i2v", "unet.drift0.8"),
    ),
    "cameractrl": lambda f: (
        {"camera": {"path": str(f / "cameractrl.safetensors"), "poses": str(FOLDER / "pose.txt"), "scale": 0.6}},
        of_families("cameractrl", "unet.scale0.6"),
    ),
}
LORAS = [name for name in FILES if f"{name}/unet.sample" in EXPECTED]


@pytest.fixture
def asked(monkeypatch):
    """What the network predicts for the second golden clip, of every clip of a run that is told one golden text."""

    def asked(context: Tensor, config: Path, output: Path) -> list[Tensor]:
        seen: list[Tensor] = []

        def ask_once(x: Tensor, steps) -> Tensor:
            assert x.shape == LATENTS[1:].shape
            seen.append(steps.denoise(LATENTS[1:], torch.tensor([481])))
            return x

        monkeypatch.setattr("animatediff.pipeline.sample.find_sampler", lambda *_, **__: ask_once)
        monkeypatch.setattr("animatediff.pipeline.pipeline.encode_prompts", lambda *_, **__: (context[1:], None))
        main(["--config", str(config), "--device", "cpu", "--output-dir", str(output)])
        return seen

    return asked


VALUES = {"H": 64, "W": 128, "L": 5, "steps": 6, "guidance_scale": 1.0, "format": "png"}


@pytest.mark.parametrize("family", FAMILIES)
def test_golden_numbers_through_the_command_line(folder, tmp_path, monkeypatch, asked, family):  # noqa: F811
    options, video = FAMILIES[family](folder)
    monkeypatch.setattr(pia_feature, "picture_latents", lambda *_: expected("pia")["input.image_latents"][0])
    monkeypatch.setattr(i2v_feature, "picture_latents", lambda *_: 0.18215 * GOLDEN["vae.mean"][0])
    config = write_config(tmp_path / "run.yaml", entry(folder, **(VALUES | options)))
    (got,) = asked(CONTEXT, config, tmp_path / "out")
    assert_close(got, video[1:])


@pytest.mark.parametrize("names", [("dora", "peft"), pytest.param(LORAS, marks=pytest.mark.slow)], ids=len)
def test_golden_numbers_of_loras_through_the_command_line(folder, tmp_path, asked, names):  # noqa: F811
    """One run, an entry for each algorithm and dialect."""
    entries = []
    for name in names:
        (tmp_path / name).mkdir()
        lora = {"motion_module": "", "lora_model_path": str(written(name, tmp_path / name)), "lora_alpha": 0.7}
        entries.append(entry(folder, **(VALUES | lora)))
    config = write_config(tmp_path / "run.yaml", *entries)
    for name, got in zip(names, asked(NANO["text.last_hidden_state"], config, tmp_path / "out"), strict=True):
        assert_close(got, rearrange(EXPECTED[f"{name}/unet.sample"], "b c f h w -> b f c h w")[1:])
