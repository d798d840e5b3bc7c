"""Properties of the networks: sizes, identity at birth, who sees whom."""

from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from animatediff.config.networks import MOTION_VERSIONS, MotionConfig, UNetConfig, VAEConfig
from animatediff.models.layers import GroupNorm
from animatediff.models.motion import MotionModule, positional_encoding
from animatediff.models.unet import UNet
from animatediff.models.vae import VAE
from animatediff.utils import UserError

SMALL = UNetConfig(
    block_out_channels=(16, 24, 32),
    attention_levels=(False, True, True),
    layers_per_block=1,
    context_dim=12,
    num_heads=4,
    norm_num_groups=8,
)


def small_unet(**motion) -> UNet:
    torch.manual_seed(0)
    return UNet(replace(SMALL, motion=MotionConfig(num_heads=4, **motion)))


def inputs(frames=5, h=8, w=12):
    g = torch.Generator().manual_seed(1)
    return torch.randn(2, frames, 4, h, w, generator=g), torch.tensor([7, 500]), torch.randn(2, 9, 12, generator=g)


def wake(unet: UNet) -> UNet:
    """Give the zero-initialised outputs of the motion modules something to say."""
    for name, parameter in unet.motion_parameters():
        if "proj_out" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return unet


def test_sd15_size():
    with torch.device("meta"):
        state = UNet(UNetConfig()).state_dict()
    assert (len(state), sum(t.numel() for t in state.values())) == (686, 859_520_964)


@pytest.mark.parametrize(
    ("version", "keys", "parameters"), [("v1", 520, 417_137_600), ("v2", 546, 453_209_280), ("v3", 520, 417_137_600)]
)
def test_sd15_motion_size(version, keys, parameters):
    with torch.device("meta"):
        motion = dict(UNet(UNetConfig(motion=MOTION_VERSIONS[version])).motion_parameters())
    assert (len(motion), sum(p.numel() for p in motion.values())) == (keys, parameters)


def test_a_fresh_motion_module_is_the_identity():
    x = torch.randn(6, 32, 4, 4)
    assert torch.equal(MotionModule(32, MotionConfig(num_heads=4), groups=8)(x, 3), x)


@torch.no_grad()
def test_fresh_modules_leave_the_image_model_as_it_is():
    video = small_unet(mid_block=True)
    image = UNet(SMALL)
    image.load_state_dict({k: v for k, v in video.state_dict().items() if "motion_modules" not in k})
    assert torch.equal(video(*inputs()), image(*inputs()))


@torch.no_grad()
def test_frames_see_each_other_only_through_motion_modules():
    x, t, context = inputs()
    changed = x.clone()
    changed[:, 3] += 1
    image = UNet(SMALL)
    moved = (image(x, t, context) - image(changed, t, context)).abs().amax(dim=(0, 2, 3, 4))
    assert moved[3] > 1e-3 and moved[[0, 1, 2, 4]].max() < 1e-5
    video = wake(small_unet())
    assert (video(x, t, context) - video(changed, t, context)).abs().amax(dim=(0, 2, 3, 4)).min() > 1e-4


@pytest.mark.parametrize("pooled", [False, True])
@torch.no_grad()
def test_v1_pools_group_norm_over_frames(pooled):
    x, t, context = inputs()
    changed = x.clone()
    changed[:, 3] += 1
    unet = small_unet(resnet_norm_over_frames=pooled, resolutions=(1,))  # fresh modules: the norms alone may couple
    others = (unet(x, t, context) - unet(changed, t, context))[:, [0, 1, 2, 4]].abs().max()
    assert (others > 1e-4) == pooled


def test_group_norm_over_frames_is_one_norm_of_the_clip():
    norm = GroupNorm(4, 8, eps=1e-5, over_frames=True)
    out = norm(torch.randn(6, 8, 5, 5) * 3 + 1, 3).reshape(2, 3, 4, 2, 25)
    assert out.mean(dim=(1, 3, 4)).abs().max() < 1e-5
    assert (out.var(dim=(1, 3, 4), correction=0) - 1).abs().max() < 1e-3


@torch.no_grad()
def test_videos_of_a_batch_are_independent():
    unet = wake(small_unet(resnet_norm_over_frames=True))
    x, t, context = inputs()
    alone = torch.cat([unet(x[i : i + 1], t[i : i + 1], context[i : i + 1]) for i in range(2)])
    assert torch.allclose(unet(x, t, context), alone, atol=1e-5)


@pytest.mark.parametrize("size", [(7, 5), (1, 1), (10, 6)])
def test_any_latent_size(size):
    assert small_unet()(*inputs(2, *size)).shape == (2, 2, 4, *size)


def test_more_frames_than_trained_is_an_error_that_says_what_to_do():
    with pytest.raises(UserError, match="got 5 frames, expected at most 4.*max_frames"):
        small_unet(max_frames=4)(*inputs())


def test_positional_encoding():
    code = positional_encoding(40, 16, torch.device("cpu"), torch.float32)
    assert torch.equal(code[:24], positional_encoding(24, 16, torch.device("cpu"), torch.float32))
    assert torch.allclose(code[3, 2:4], torch.tensor([3 * 10_000 ** (-2 / 16)] * 2).sin().where(
        torch.tensor([True, False]), torch.tensor([3 * 10_000 ** (-2 / 16)] * 2).cos()))  # fmt: skip


@pytest.mark.parametrize("resolutions", [(1,), (2, 4), (1, 2, 4)])
def test_modules_stand_only_at_the_resolutions_asked_for(resolutions):
    names = {n.split(".motion_modules")[0] for n, _ in small_unet(resolutions=resolutions).motion_parameters()}
    expected = {f"down_blocks.{i}" for i in range(3) if 2**i in resolutions}
    assert names == expected | {f"up_blocks.{2 - i}" for i in range(3) if 2**i in resolutions}


def test_context_rows_are_shared_by_frames():
    x, t, context = inputs()
    unet = UNet(SMALL)
    frames_as_videos = unet(x.flatten(0, 1)[:, None], t.repeat_interleave(5), context.repeat_interleave(5, dim=0))
    assert torch.allclose(unet(x, t, context).flatten(0, 1), frames_as_videos[:, 0], atol=1e-5)


def test_a_context_of_its_own_for_every_frame():
    x, t, context = inputs()
    unet = wake(small_unet())
    each = context[:, None].expand(-1, 5, -1, -1)
    assert torch.allclose(unet(x, t, each), unet(x, t, context), atol=1e-5)
    image = UNet(SMALL)
    context = torch.randn(2, 5, 9, 12)
    frame = image(x[:, 3:4], t, context[:, 3])
    assert torch.allclose(image(x, t, context)[:, 3:4], frame, atol=1e-5)


def test_residuals_reach_skips_and_middle():
    x, t, context = inputs()
    unet = UNet(SMALL)
    shapes = [(16, 8, 12), (16, 8, 12), (16, 4, 6), (24, 4, 6), (24, 2, 3), (32, 2, 3)]
    zeros = [torch.zeros(10, *shape) for shape in shapes]
    plain = unet(x, t, context)
    assert torch.equal(unet(x, t, context, down_residuals=zeros, mid_residual=torch.zeros(10, 32, 2, 3)), plain)
    for i in range(len(zeros)):
        ones = [z + (i == j) for j, z in enumerate(zeros)]
        assert not torch.allclose(unet(x, t, context, down_residuals=ones), plain)


class OverflowingVAE(VAE):
    def decode(self, z):
        out = super().decode(z)
        return out * float("inf") if out.dtype != torch.float32 else out


def test_half_precision_overflow_falls_back_to_float32():
    torch.manual_seed(0)
    vae = OverflowingVAE(VAEConfig(block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4)).bfloat16()
    out = vae.decode_video(torch.randn(1, 3, 4, 4, 4), chunk_frames=2)
    assert out.isfinite().all() and out.shape == (1, 3, 3, 8, 8) and out.abs().max() <= 1


@torch.no_grad()
def test_vae_chunks_do_not_change_the_video():
    torch.manual_seed(0)
    vae = VAE(VAEConfig(block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4))
    video = torch.rand(2, 3, 3, 8, 8) * 2 - 1
    latents = vae.encode_video(video, chunk_frames=6)
    assert torch.allclose(vae.encode_video(video, chunk_frames=1), latents, atol=1e-6)
    assert torch.allclose(
        vae.decode_video(latents, chunk_frames=4), vae.decode_video(latents, chunk_frames=1), atol=1e-5
    )


@pytest.mark.slow
@torch.no_grad()
def test_compiled_whole_it_copies_nothing_from_the_cpu():
    """Not even the codes of the frames, which are otherwise made there and kept."""
    sizes = {"block_out_channels": (8, 16), "attention_levels": (True, False), "norm_num_groups": 2}
    unet = UNet(replace(SMALL, **sizes, num_heads=2, motion=MotionConfig(num_heads=2, resolutions=(1,))))
    graphs = []
    whole = torch.compile(unet, fullgraph=True, backend=lambda graph, _: graphs.append(graph.code) or graph.forward)
    assert torch.equal(whole(*inputs()), unet(*inputs()))
    made = [line for line in graphs[0].splitlines() if "torch.arange" in line]
    assert made and all("device = device(type='cpu')" in line for line in made)  # the network's, not the default


@pytest.mark.slow
@torch.no_grad()
def test_fake_tensors_leave_nothing_behind():
    unet = wake(small_unet())
    expected = unet(*inputs(7))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        for frames in (7, 6):
            fake = unet(*(mode.from_tensor(x) for x in inputs(frames)))
            assert fake.shape == inputs(frames)[0].shape
    assert torch.equal(unet(*inputs(7)), expected) and unet(*inputs(6)).isfinite().all()
