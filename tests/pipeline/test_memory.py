"""A clip of 1,000 frames needs the memory of 16 and its latents: windows, frames decoded and written as a stream."""

import re
from pathlib import Path

import pytest
import torch

from animatediff.config.networks import MOTION_VERSIONS, ScheduleConfig, UNetConfig, VAEConfig
from animatediff.config.request import Windows
from animatediff.diffusion.samplers import Steps, ddim
from animatediff.diffusion.schedule import NoiseSchedule
from animatediff.features.windows import sliding_windows
from animatediff.media.video import FrameStream, read_video, save_video
from animatediff.models.unet import UNet
from animatediff.models.vae import VAE
from animatediff.pipeline.model import Model
from animatediff.pipeline.pipeline import AnimateDiffPipeline

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
SIDE = 64  # pixels
MIB = 2**20


def resident(what):
    """VmRSS or its peak since it was last cleared, VmHWM, in bytes."""
    return int(re.search(rf"{what}:\s+(\d+) kB", STATUS.read_text())[1]) * 1024


@pytest.fixture
def networks():
    torch.manual_seed(0)
    config = UNetConfig(4, 4, (8, 8), (True, False), 1, 8, 2, norm_num_groups=4)
    unet = UNet(config.with_motion(MOTION_VERSIONS["v3"])).eval()
    vae = VAE(VAEConfig(block_out_channels=(4, 4, 4, 4), layers_per_block=1, norm_num_groups=2)).eval()
    return Model(unet, vae, None, None, ScheduleConfig(), None)


@pytest.mark.slow
@pytest.mark.skipif(not CLEAR.exists(), reason="needs Linux's count of the peak")
def test_memory_does_not_grow_with_the_clip(networks, tmp_path):
    context, schedule = torch.randn(1, 3, 8), NoiseSchedule(ScheduleConfig())
    timesteps = schedule.timesteps(1)

    @torch.no_grad()
    def peak(frames):
        """Bytes above what is resident before a clip is made and written."""
        CLEAR.write_text("5")
        before = resident("VmRSS")
        denoise = sliding_windows(lambda x, t, frames: networks.unet(x, t, context), Windows(length=16), timesteps)
        x = torch.randn(1, frames, 4, SIDE // 8, SIDE // 8)
        latents = ddim(x, Steps(denoise, schedule, timesteps)).transpose(1, 2)
        stream = AnimateDiffPipeline(networks).decode_frames(latents)
        save_video(FrameStream(frames, stream), tmp_path / str(frames))
        return resident("VmHWM") - before

    peak(16)  # what torch sets up once
    short, long = peak(16), peak(1000)
    assert len(list((tmp_path / "1000").glob("*.png"))) == 1000
    assert read_video(tmp_path / "16")[0].shape == (16, SIDE, SIDE, 3)
    frames = 1000 * 3 * SIDE**2
    print(
        f"peak of 16 frames {short / MIB:.1f} MiB, of 1000 {long / MIB:.1f} MiB; all frames as bytes {frames / MIB:.1f}"
    )
    assert long - short < frames / 2, "not even as bytes are all frames ever held"
