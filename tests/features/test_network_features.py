"""What reaches into a UNet does what it says, and leaves nothing behind."""

import pytest
import torch

from animatediff.config.networks import MOTION_VERSIONS, UNetConfig
from animatediff.features.freeu import freeu_applied, scale_backbone, scale_skip_low_frequencies
from animatediff.features.motion_scale import MotionScale, motion_scaled, positions_stretched
from animatediff.features.perturbed_attention import attention_perturbed, find_attentions
from animatediff.lab.cross_frame import cross_frame_attention
from animatediff.models.attention import Attention
from animatediff.models.motion import TemporalTransformer, positional_encoding
from animatediff.models.unet import UNet
from animatediff.utils import UserError

CONFIG = UNetConfig(
    block_out_channels=(8, 16), attention_levels=(True, True), layers_per_block=1, context_dim=8, num_heads=2,
    norm_num_groups=4,
)  # fmt: skip


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(0)
    unet = UNet(CONFIG.with_motion(MOTION_VERSIONS["v2"])).eval().requires_grad_(False)
    for module in unet.modules():
        if isinstance(module, TemporalTransformer):
            torch.nn.init.normal_(module.proj_out.weight, std=0.3)
    return unet


@pytest.fixture(scope="module")
def image_model(unet):
    image = UNet(CONFIG).eval()
    image.load_state_dict({k: v for k, v in unet.state_dict().items() if "motion_modules" not in k})
    return image.requires_grad_(False)


INPUT = (torch.randn(2, 4, 4, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([7, 7]))
TEXT = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(2))


@pytest.fixture
def run(unet):
    plain = unet(*INPUT, TEXT)
    yield lambda: unet(*INPUT, TEXT)
    assert torch.equal(unet(*INPUT, TEXT), plain), "nothing is left behind"


def scaled(values, mask=None):
    scale = MotionScale(mask)
    scale.values = torch.tensor(values)
    return scale


def test_motion_scale(unet, image_model, run):
    image, video = image_model(*INPUT, TEXT), run()
    assert not torch.allclose(image, video, atol=1e-2)
    with motion_scaled(unet, scaled([0.0] * 4)):
        assert torch.equal(run(), image)
    with motion_scaled(unet, scaled([1.0] * 4)):
        assert torch.allclose(run(), video, atol=1e-4)
    with motion_scaled(unet, scaled([1.0, 0.0, 0.0, 1.0])):
        frames = run()
    assert torch.equal(frames[:, 1:3], image[:, 1:3]), "frames without motion are the image model's"
    assert not torch.allclose(frames[:, 0], image[:, 0], atol=1e-2)


def test_motion_mask(unet, image_model, run):
    with motion_scaled(unet, scaled([1.0] * 4, torch.zeros(64, 64))):
        assert torch.equal(run(), image_model(*INPUT, TEXT))
    half = torch.zeros(64, 64)
    half[:, 32:] = 1
    module = unet.down_blocks[0].motion_modules[0]
    x = torch.randn(4, 8, 8, 8)
    with motion_scaled(unet, scaled([1.0] * 4, half)):
        out = module(x, 4)
    assert torch.equal(out[..., :4], x[..., :4]) and torch.allclose(out[..., 4:], module(x, 4)[..., 4:], atol=1e-5)


def test_stretched_positions(unet, run):
    """Every second of the stretched positions is a trained one; twice as long clips are allowed, meanwhile."""
    stretched = positional_encoding(8, 6, torch.device("cpu"), torch.float32, 2.0)
    assert torch.equal(stretched[::2], positional_encoding(4, 6, torch.device("cpu"), torch.float32))
    plain, long = run(), torch.randn(1, 64, 4, 2, 2)
    with positions_stretched(unet, 2.0):
        assert not torch.allclose(run(), plain, atol=1e-3)
        unet(long, torch.tensor([7]), TEXT[:1])
    with positions_stretched(unet, 1.0):
        assert torch.equal(run(), plain)
    with pytest.raises(UserError, match="got 64 frames, expected at most 32"):
        unet(long, torch.tensor([7]), TEXT[:1])
    with pytest.raises(ZeroDivisionError), positions_stretched(unet, 3.0):
        raise ZeroDivisionError
    assert unet.config.motion.max_frames == 32


def test_perturbed_attention(unet, run):
    """Only the last part of the batch changes; an identity map is what attention to a single token is."""
    plain = run()
    with attention_perturbed(unet, ["mid_block"], parts=2):
        perturbed = run()
    assert torch.allclose(perturbed[0], plain[0], atol=1e-5)
    assert not torch.allclose(perturbed[1], plain[1], atol=1e-4)
    attention, x = Attention(8, 2), torch.randn(3, 5, 8)
    alone = attention(x.reshape(15, 1, 8)).reshape(3, 5, 8)
    assert torch.allclose(attention.identity(x), alone, atol=1e-6)
    assert len(find_attentions(unet, ["down_blocks", "up_blocks.1.attentions.0"])) == 3
    for wrong in ("mid", "down_blocks.0.resnets"):
        with pytest.raises(
            UserError, match=f"pag_layers: got '{wrong}', expected .* down_blocks.0, down_blocks.1, mid"
        ):
            find_attentions(unet, [wrong])


def test_cross_frame_attention(image_model):
    """Frames see the first one of their own clip, and of the others nothing; the first frame is the image model's."""
    x, t = INPUT
    plain = image_model(x, t, TEXT)
    with cross_frame_attention(image_model):
        crossed = image_model(x, t, TEXT)
        assert torch.allclose(image_model(x[:, :1], t, TEXT), plain[:, :1], atol=1e-5), "one frame alone"
        for frame, seen_by in ((2, [2]), (0, [0, 1, 2, 3])):
            other = x.clone()
            other[1, frame] += 1
            changed = (image_model(other, t, TEXT) - crossed).abs().amax((2, 3, 4)) > 1e-4
            assert changed[1].nonzero().flatten().tolist() == seen_by and not changed[0].any()
    assert torch.allclose(crossed[:, 0], plain[:, 0], atol=1e-5)
    assert not torch.allclose(crossed[:, 1:], plain[:, 1:], atol=1e-3)
    assert torch.equal(image_model(x, t, TEXT), plain), "nothing is left behind"


def test_freeu(unet, run):
    plain = run()
    with freeu_applied(unet, (1.0, 1.0), (1.0, 1.0)):
        assert torch.allclose(run(), plain, atol=1e-5)
    with freeu_applied(unet, (1.5, 1.6), (0.9, 0.2)):
        assert not torch.allclose(run(), plain, atol=1e-3)


def test_freeu_formulas():
    x = torch.randn(2, 6, 4, 5)
    strong = scale_backbone(x, 1.5)
    assert torch.equal(strong[:, 3:], x[:, 3:])
    factor = (strong / x)[:, 0]
    assert torch.allclose(factor.amax((1, 2)), torch.tensor(1.5)) and torch.allclose(
        factor.amin((1, 2)), torch.tensor(1.0)
    )
    flat = torch.full((1, 2, 4, 4), 3.0)
    assert torch.allclose(scale_skip_low_frequencies(flat, 0.2), 0.2 * flat)
    checker = flat * torch.tensor([1.0, -1.0]).repeat(2) * torch.tensor([[1.0], [-1.0]]).repeat(2, 1)
    assert torch.allclose(scale_skip_low_frequencies(checker, 0.2), checker, atol=1e-6)
    assert torch.equal(scale_backbone(flat, 1.5), flat), "where there is no structure, nothing is strengthened"
