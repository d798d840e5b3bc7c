"""Devices, types, noise, and twins that share storage without sharing changes."""

from types import SimpleNamespace

import pytest
import torch
from einops import rearrange
from torch import nn

from animatediff.config.request import Request, Sampling
from animatediff.diffusion.guidance import classifier_free_guidance, guide
from animatediff.features.feature import Run
from animatediff.features.noise import draw_noise, draw_seed, make_noise, seeded
from animatediff.features.prompt_travel import text_of_frames
from animatediff.models.twins import share_weights
from animatediff.pipeline.device import pick_device, pick_dtype, to_device
from animatediff.pipeline.sample import guided_denoiser
from animatediff.utils import UserError


@pytest.mark.parametrize("seed", [0, 42, 2**63, 18368660165286593270, 2**64 - 1])
def test_noise_is_the_official_draw(seed):
    """`torch.manual_seed(seed); torch.randn(1, 4, f, h, w)`, with frames and channels swapped."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        expected = torch.randn(1, 4, 5, 6, 7)
        state = torch.get_rng_state()
        noise = make_noise(seed, (1, 4, 5, 6, 7))
        assert torch.equal(torch.get_rng_state(), state)  # the global generator is left alone
    assert noise.shape == (1, 5, 4, 6, 7) and noise.dtype == torch.float32
    assert torch.equal(rearrange(noise, "b f c h w -> b c f h w"), expected)


def test_noise_of_a_clip_does_not_depend_on_the_batch():
    batch = draw_noise([seeded(1), seeded(2)], (4, 3, 5, 5))
    assert torch.equal(batch[1:], make_noise(2, (1, 4, 3, 5, 5)))
    shared = seeded(7)
    assert torch.equal(draw_noise([shared, shared], (4, 3, 5, 5))[:1], make_noise(7, (1, 4, 3, 5, 5)))


def test_seeds():
    assert len({draw_seed() for _ in range(20)}) == 20
    for seed in (-1, 2**64):
        with pytest.raises(UserError, match="expected 0 to 2\\^64 - 1"):
            seeded(seed)


def test_devices_and_types():
    cpu = pick_device("cpu")
    assert cpu.type == "cpu" and pick_dtype(None, cpu) == torch.float32
    assert pick_dtype(None, torch.device("cuda")) == torch.float16 and pick_dtype("bfloat16", cpu) == torch.bfloat16
    for name in ("tpu", "cuda:x", "cpux"):
        with pytest.raises(UserError, match=f"got device '{name}'"):
            pick_device(name)
    with pytest.raises(UserError, match="got dtype 'half'"):
        pick_dtype("half", cpu)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_here():
    with pytest.raises(UserError, match="'cuda', which is not available: use auto"):
        pick_device("cuda")


def test_twins_share_storage_but_not_changes():
    original = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3)).eval()
    before = {key: tensor.clone() for key, tensor in original.state_dict().items()}
    twin = share_weights(original)
    assert twin[0].weight.data_ptr() == original[0].weight.data_ptr() and twin[0].weight is not original[0].weight
    assert twin[1].running_mean.data_ptr() == original[1].running_mean.data_ptr()
    to_device(twin, torch.device("cpu"), torch.float16)
    twin[0].weight = nn.Parameter(torch.zeros_like(twin[0].weight))
    assert twin[0].bias.dtype == torch.float16
    assert all(torch.equal(tensor, before[key]) for key, tensor in original.state_dict().items())


def test_what_a_network_holds_twice_its_twin_holds_twice():
    layer, tied = nn.Linear(2, 2), nn.Linear(2, 2, bias=False)
    tied.weight = layer.weight
    twin = share_weights(nn.Sequential(layer, nn.Sequential(layer, tied)))
    assert twin[0] is twin[1][0] is not layer and twin[1][1].weight is twin[0].weight is not layer.weight
    assert twin[1][1].bias is None
    twin[0].register_forward_hook(lambda *_: torch.zeros(2))
    assert twin(torch.ones(2)).eq(0).all() and not layer._forward_hooks


class Recorder(nn.Module):
    """A network whose prediction is the mean of its context; it notes what it was called with."""

    def __init__(self, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.conv_in = nn.Conv2d(1, 1, 1, dtype=dtype)
        self.calls: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def forward(self, x, t, context):
        self.calls.append((x, t, context))
        return context.mean((1, 2)).reshape(-1, 1, 1, 1, 1).expand_as(x)


def denoiser(unet, context, negative, scale):
    """The denoiser of a network for these contexts."""
    parts = {"conditional": context} if scale <= 1 else {"unconditional": negative, "conditional": context}
    request = Request(sampling=Sampling(guidance_scale=scale))
    text = text_of_frames(list(parts.values()), like=unet.conv_in.weight)
    run = Run(
        SimpleNamespace(unet=unet, loras=None, lora_roles={}, networks={}),
        request,
        None,
        torch.tensor([9, 5]),
        text,
        tuple(parts),
    )
    with guided_denoiser(run) as denoise:
        return denoise


def test_guidance():
    unet = Recorder()
    negative, positive = torch.zeros(2, 3, 4), torch.stack([torch.full((3, 4), 1.0), torch.full((3, 4), 2.0)])
    denoise = denoiser(unet, positive, negative, 7.5)
    x, t = torch.randn(2, 5, 4, 2, 2), torch.tensor([3, 8])
    assert torch.equal(denoise(x, t)[:, 0, 0, 0, 0], torch.tensor([7.5, 15.0]))
    ((seen, times, context),) = unet.calls
    assert torch.equal(seen, torch.cat([x, x])) and times.tolist() == [3, 8, 3, 8]
    assert torch.equal(context, torch.cat([negative, positive]))  # unconditional half first


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0])
def test_no_unconditional_pass_without_guidance(scale):
    unet = Recorder(torch.float16)
    context = torch.ones(1, 3, 4)
    out = denoiser(unet, context, 0 * context, scale)(torch.zeros(1, 2, 4, 2, 2), torch.tensor([5]))
    assert out.dtype == torch.float32 and (out == 1).all()
    assert len(unet.calls[0][0]) == 1 and unet.calls[0][0].dtype == unet.calls[0][2].dtype == torch.float16


def test_guidance_formula():
    uncond, cond = torch.randn(2, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(guide(uncond, cond, 0), uncond)
    assert torch.allclose(guide(uncond, cond, 1), cond)
    assert torch.allclose(guide(uncond, cond, 3), 3 * cond - 2 * uncond)
    both = classifier_free_guidance(lambda x, t: torch.cat([uncond, cond]), 3.0)
    assert torch.equal(both(torch.zeros(2, 3), torch.zeros(2)), guide(uncond, cond, 3.0))
