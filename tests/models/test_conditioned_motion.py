"""PIA and AnimateLCM-I2V against the numbers of their official code; their files are told apart and complete."""

from dataclasses import replace

import pytest
import torch
from einops import rearrange
from safetensors.torch import load_file

from animatediff.checkpoints.keymaps import motion_to_diffusers
from animatediff.checkpoints.load import load_base, load_motion_module
from animatediff.checkpoints.motion_condition_files import load_motion_condition
from animatediff.config.networks import MOTION_VERSIONS, UNetConfig
from animatediff.models.image_to_video_network import LevelFeatures, PictureEncoder, level_features_added
from animatediff.models.pia_network import PIACondition, pia_affinity
from animatediff.utils import UserError
from tests.checkpoints.synthetic import equal, write
from tests.families import conditioned_motion_tensors, expected, video
from tests.models.test_golden import GOLDEN, assert_close, golden
from tests.nano import write_files

T = torch.tensor([481, 481])
CONTEXT = GOLDEN["text.last_hidden_state"]
# The presets' numbers in the official code.
PRESETS = [(m, s) for s in ({}, {"loop": True}) for m in ("small", "medium", "large")]
PRESETS += [(m, {"style_transfer": True}) for m in ("large", "medium", "small")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = write_files(tmp_path_factory.mktemp("nano"))
    write(folder / "pia.safetensors", conditioned_motion_tensors("pia"))
    write(folder / "i2v.safetensors", conditioned_motion_tensors("animatelcm_i2v"))
    return folder


@pytest.fixture(scope="module")
def base(folder):
    return load_base(folder / "nano.safetensors")


@pytest.fixture(scope="module")
def pia(folder, base):
    path = folder / "pia.safetensors"
    return load_motion_module(base.unet, path)[0], load_motion_condition(path, base.unet)[0]


@pytest.fixture(scope="module")
def i2v(folder, base):
    path = folder / "i2v.safetensors"
    return load_motion_module(base.unet, path)[0], load_motion_condition(path, base.unet)[0]


@pytest.mark.parametrize("number", range(9))
def test_pia_affinities(number):
    motion, settings = PRESETS[number]
    for frame in (0, 2):
        got = pia_affinity(motion, 16, picture_frame=frame, **settings)
        assert got == pytest.approx(expected("pia")[f"mask.{number}.cond{frame}.f16"].tolist())
    if "loop" not in settings:  # official loops of other lengths than 16 do not come back
        assert pia_affinity(motion, 5, **settings) == pytest.approx(expected("pia")[f"mask.{number}.cond0.f5"].tolist())


@pytest.mark.parametrize("frames", [2, 5, 12, 24])
@pytest.mark.parametrize("motion", ["small", "medium", "large"])
def test_pia_loops_of_any_length_come_back(frames, motion):
    loop = pia_affinity(motion, frames, loop=True)
    assert (
        len(loop) == frames and loop[0] == loop[-1] == 1 and min(loop) == min(loop[frames // 2 - 1 : frames // 2 + 2])
    )


@pytest.mark.parametrize(
    ("name", "number", "frame"),
    [("mask0", 0, 0), ("mask1", 1, 0), ("mask2", 2, 0), ("mask2.cond2", 2, 2), ("mask6", 6, 0)],
)
@torch.no_grad()
def test_pia(pia, name, number, frame):
    unet, condition = pia
    motion, settings = PRESETS[number]
    affinity = torch.tensor(pia_affinity(motion, 5, picture_frame=frame, **settings))
    added = condition(expected("pia")["input.image_latents"][0], affinity).repeat(2, 1, 1, 1)
    got = unet(golden("input.latents"), T, CONTEXT, input_residual=added)
    assert_close(got, video("pia", f"unet.{name}"))


@torch.no_grad()
def test_pia_is_one_convolution_of_nine_channels(pia):
    unet, condition = pia
    inputs = rearrange(expected("pia")["conv_in.mask1"], "1 c f h w -> f c h w")
    weight = torch.cat([unet.conv_in.weight, condition.conv.weight], dim=1)
    whole = torch.nn.functional.conv2d(inputs, weight, unet.conv_in.bias, padding=1)
    mask, latents = inputs[:, 4, 0, 0], inputs[0, 5:]
    assert_close(unet.conv_in(inputs[:, :4]) + condition(latents, mask), whole, 1e-6)


def predict_i2v(i2v, drift: float | None, latents: torch.Tensor, picture: torch.Tensor, weights=(1.0,) * 4, rows=2):
    unet, encoder = i2v
    with torch.no_grad():
        if drift is None:
            return unet(latents, T[:rows], CONTEXT[:rows])
        features = LevelFeatures()
        maps = encoder(picture.expand(latents.shape[1], -1, -1, -1), drift)
        features.values = [w * m for w, m in zip(weights, maps, strict=True)]
        with level_features_added(unet, features):
            return unet(latents, T[:rows], CONTEXT[:rows])


@pytest.mark.parametrize("drift", [0.0, 0.8])
@torch.no_grad()
def test_animatelcm_i2v_features(i2v, drift):
    picture = 0.18215 * GOLDEN["vae.mean"][:1]
    maps = i2v[1](picture.expand(5, -1, -1, -1), drift)
    for level, got in enumerate(maps):
        name = f"features.drift{drift}.{level}"
        assert_close(got, rearrange(video("animatelcm_i2v", name), "1 f c h w -> f c h w"))


def test_animatelcm_i2v(i2v):
    latents, picture = golden("input.latents"), 0.18215 * GOLDEN["vae.mean"][:1]
    assert_close(predict_i2v(i2v, None, latents, picture), video("animatelcm_i2v", "unet.no_image"))
    for drift in (0.0, 0.8):
        assert_close(predict_i2v(i2v, drift, latents, picture), video("animatelcm_i2v", f"unet.drift{drift}"))
    weighted = predict_i2v(i2v, 0.8, latents, picture, weights=(1, 0.5, 0.25, 0))
    assert_close(weighted, video("animatelcm_i2v", "unet.drift0.8.weights_1_.5_.25_0"))
    odd = predict_i2v(i2v, 0.8, latents[:1, :3, :, :7, :15], picture[..., :7, :15], rows=1)
    assert_close(odd, video("animatelcm_i2v", "unet.odd_7x15"))
    assert_close(predict_i2v(i2v, None, latents, picture), video("animatelcm_i2v", "unet.no_image"))


def test_files(folder, base, pia, i2v):
    assert pia[0].config.motion.version == "pia" and isinstance(pia[1], PIACondition)
    assert i2v[0].config.motion.version == "animatelcm" and isinstance(i2v[1], PictureEncoder)
    assert torch.equal(pia[0].conv_in.weight, base.unet.conv_in.weight)
    assert load_motion_condition(folder / "mm_v3.safetensors", base.unet) is None
    half = write(folder / "half.safetensors", conditioned_motion_tensors("animatelcm_i2v"))
    cut = {k: t for k, t in load_file(half).items() if not k.startswith("img_encoder.body.7")}
    with pytest.raises(UserError, match="complete animatelcm-i2v network for pictures.*4 weights are missing"):
        load_motion_condition(write(half, cut), base.unet)
    wide = conditioned_motion_tensors("pia") | {"conv_in.weight": torch.zeros(32, 12, 3, 3)}
    with pytest.raises(UserError, match=r"got a conv_in of shape \(32, 12, 3, 3\), expected \(32, 9, 3, 3\)"):
        load_motion_condition(write(half, wide), base.unet)


def test_pia_as_a_diffusers_adapter(tmp_path, base, pia):
    tensors = {motion_to_diffusers(key): t for key, t in conditioned_motion_tensors("pia").items()}
    write(tmp_path / "diffusion_pytorch_model.safetensors", tensors)
    (tmp_path / "config.json").write_text('{"_class_name": "MotionAdapter", "motion_max_seq_length": 24}')
    unet, _ = load_motion_module(base.unet, tmp_path)
    assert unet.config.motion == replace(MOTION_VERSIONS["pia"], max_frames=24)
    assert equal(dict(unet.state_dict()), dict(pia[0].state_dict()))
    condition, report = load_motion_condition(tmp_path, base.unet)
    assert equal(dict(condition.state_dict()), dict(pia[1].state_dict())) and report.kind == "pia"


def test_sizes_of_the_released_files():
    with torch.device("meta"):
        encoder = PictureEncoder(UNetConfig())
    assert (sum(p.numel() for p in encoder.parameters()), len(encoder.state_dict())) == (76_827_840, 38)
