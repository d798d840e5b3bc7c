"""CameraCtrl against the numbers of its official code; its files and camera paths."""

import pytest
import torch
from einops import rearrange

from animatediff.checkpoints.cameractrl_files import load_cameractrl
from animatediff.checkpoints.load import load_base, load_motion_module
from animatediff.config.networks import CameraConfig
from animatediff.media.camera_poses import plucker_embedding, read_camera_path
from animatediff.models.camera_network import CameraCtrl, CameraFeatures, camera_merged
from animatediff.utils import UserError
from tests.checkpoints.synthetic import equal, motion_tensors, write
from tests.families import FOLDER, TABLES, cameractrl_tensors, expected, video
from tests.models.test_golden import GOLDEN, assert_close, golden
from tests.nano import write_files

T = torch.tensor([481, 481])
CONTEXT = GOLDEN["text.last_hidden_state"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = write_files(tmp_path_factory.mktemp("nano"))
    write(folder / "cameractrl.safetensors", cameractrl_tensors())
    return folder


@pytest.fixture(scope="module")
def unet(folder):
    return load_motion_module(load_base(folder / "nano.safetensors").unet, folder / "mm_v3.safetensors")[0]


@pytest.fixture(scope="module")
def camera(folder, unet):
    return load_cameractrl(folder / "cameractrl.safetensors", unet)[0]


@torch.no_grad()
def test_features(camera):
    path = read_camera_path(FOLDER / "pose.txt").of(torch.arange(5))
    for level, got in enumerate(camera.pose_encoder(plucker_embedding(path, 64, 128))):
        assert_close(got, rearrange(video("cameractrl", f"features.{level}"), "1 f c h w -> f c h w"))


@torch.no_grad()
def test_video_model(unet, camera):
    features = CameraFeatures()
    features.values = camera.pose_encoder(expected("cameractrl")["plucker"])
    for scale, number in ((1.0, video("cameractrl", "unet.scale1.0")), (0.6, video("cameractrl", "unet.scale0.6"))):
        features.scale = scale
        with camera_merged(unet, camera, features):
            assert_close(unet(golden("input.latents"), T, CONTEXT), number)
    features.scale = 0.0
    with camera_merged(unet, camera, features):
        assert_close(unet(golden("input.latents"), T, CONTEXT), golden("unet.v3.t481"))
    assert_close(unet(golden("input.latents"), T, CONTEXT), golden("unet.v3.t481"))


@pytest.mark.parametrize("spelling", ["official", "distributed", "positional"])
def test_every_spelling_gives_the_same_network(tmp_path, folder, unet, camera, spelling):
    tensors, path = cameractrl_tensors(), tmp_path / "x.ckpt"
    groups = {
        f"{name}_state_dict": {
            ("module." if spelling == "distributed" else "") + key: tensors[key] for key in TABLES["cameractrl"][name]
        }
        for name in ("pose_encoder", "attention_processor")
    }
    if spelling == "positional":
        key = "encoder_down_attention_blocks.0.0.attention_blocks.0.pos_encoder.pe"
        groups["pose_encoder_state_dict"][key] = torch.randn(1, 16, 32)
    torch.save(groups | {"epoch": 3, "global_step": 100}, path)
    loaded, report = load_cameractrl(path, unet)
    assert equal(dict(loaded.state_dict()), dict(camera.state_dict())) and report.applied == len(tensors)


def test_wrong_files_are_named(tmp_path, folder, unet):
    path = tmp_path / "x.safetensors"
    with pytest.raises(UserError, match="this is a motion module, not a CameraCtrl camera encoder"):
        load_cameractrl(write(path, motion_tensors("v3")), unet)
    base = load_base(folder / "nano.safetensors").unet
    with pytest.raises(UserError, match="got CameraCtrl without a motion module, expected v3's"):
        load_cameractrl(write(path, cameractrl_tensors()), base)
    cut = {k: t for k, t in cameractrl_tensors().items() if not k.startswith("up_blocks.3.motion_modules.2")}
    with pytest.raises(UserError, match="for 19 motion modules, expected .* and 20, the model's"):
        load_cameractrl(write(path, cut), unet)
    cut = {k: t for k, t in cameractrl_tensors().items() if k != "encoder_conv_in.bias"}
    with pytest.raises(UserError, match="1 weights are missing, such as pose_encoder.encoder_conv_in.bias"):
        load_cameractrl(write(path, cut), unet)


def test_sizes_of_the_released_file():
    with torch.device("meta"):
        camera = CameraCtrl(CameraConfig())
    count = lambda module: sum(p.numel() for p in module.parameters())  # noqa: E731
    assert (count(camera.pose_encoder), count(camera.merges)) == (199_262_400, 18_961_600)
