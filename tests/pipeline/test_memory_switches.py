"""Each switch of memory makes the same clip as without it, or one as near as its help says."""

from pathlib import Path

import pytest
import torch

import animatediff
from animatediff.checkpoints.load import load_base
from animatediff.config.memory_options import parse_size
from animatediff.models.chunks import in_parts, set_chunk
from animatediff.models.resting_weights import FLOAT8, PlainCopier, RestingWeights, find_blocks, quantised, weights_of
from animatediff.models.tiles import ramp, starts, tiled
from animatediff.models.twins import share_weights
from animatediff.pipeline import memory as memory_module
from animatediff.pipeline.pipeline import AnimateDiffPipeline
from animatediff.utils import UserError
from animatediff.world.series import World
from tests.nano import entry, write_config

ASSETS = Path(animatediff.__file__).parent / "assets"

SIZES = {"num_frames": 3, "height": 32, "width": 16, "num_inference_steps": 1, "seed": 1}  # more steps amplify rounding


def clip(pipeline, **options):
    return pipeline("a red fox", output_type="pt", **{**SIZES, **options}).frames


@pytest.fixture(scope="module")
def plain(pipeline):
    return clip(pipeline)


@pytest.fixture
def load(nano, tmp_path, monkeypatch):
    """A pipeline whose config says more; weights may leave the CPU for the CPU."""
    monkeypatch.setattr(memory_module, "has_own_memory", lambda device: True)

    def load(**values):
        path = write_config(tmp_path / "run.yaml", entry(nano, **values))
        return AnimateDiffPipeline.from_config(path, device="cpu")

    return load


@pytest.mark.parametrize(
    "options",
    [
        {"vae_frames": 1},
        {"chunk_tokens": 1},
        {"chunk_tokens": 20},
        {"split_guidance": True},
        {"split_guidance": True, "pag_scale": 2.0},
        {"split_guidance": True, "freeu": True, "windows": "open", "window_length": 2},
    ],
    ids=str,
)
def test_switches_of_a_call_change_nothing(pipeline, plain, options):
    without = {k: v for k, v in options.items() if k not in ("vae_frames", "chunk_tokens", "split_guidance")}
    expected = clip(pipeline, **without) if without else plain
    torch.testing.assert_close(clip(pipeline, **options), expected, atol=1e-3, rtol=0)
    assert pipeline.unet.mid_block.resnets[0].chunk == options.get("chunk_tokens", 0)


@pytest.mark.parametrize("offload", ["idle", "blocks"])
def test_offloaded_networks_make_the_same_clip(load, plain, offload):
    torch.testing.assert_close(clip(load(offload=offload)), plain, atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    ("values", "least", "most"),
    [
        pytest.param({"weights_dtype": "float16"}, 1e-5, 2e-3, marks=pytest.mark.slow),
        ({"weights_dtype": "bfloat16", "offload": "blocks"}, 1e-3, 2e-2),
        ({"weights_dtype": "float8"}, 1e-2, 0.15),
    ],
    ids=str,
)
def test_weights_of_fewer_bits_are_rounded(load, pipeline, values, least, most):
    x, t, text = torch.randn(1, 2, 4, 8, 8), torch.tensor([5]), torch.randn(1, 3, pipeline.unet.config.context_dim)
    with torch.no_grad():
        expected, rounded = pipeline.unet(x, t, text), load(**values).unet(x, t, text)
    error = float((rounded - expected).norm() / expected.norm())
    assert rounded.dtype == torch.float32 and least < error < most


@pytest.mark.parametrize(
    "values",
    [
        {"freeu": True, "motion_scale": 0.5, "pag_scale": 2.0},
        pytest.param(
            {
                "motion_module": "mm_v2.safetensors",
                "motion_module_lora_configs": "motion_lora.safetensors",
                "motion_lora_schedule": {"0%": 0.0, "50%": 1.0},
            },
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"lora_path": "kohya.safetensors", "lora_schedule": {"0%": 1.0, "50%": 0.2}}, marks=pytest.mark.slow
        ),
    ],
    ids=str,
)
def test_blocks_come_and_go_under_hooks_and_loras(load, nano, values):
    def located(value):
        return str(nano / value) if isinstance(value, str) and value.endswith(".safetensors") else value

    values = {name: located(value) for name, value in values.items()}
    found, expected = (clip(load(**values, **more), num_inference_steps=2) for more in ({"offload": "blocks"}, {}))
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=0)


class Counting(PlainCopier):
    """A copier that knows what it has fetched and not seen gone, and in which order it was asked."""

    def __init__(self):
        super().__init__(torch.device("cpu"))
        self.asked = []

    def start(self, made):
        self.asked.append([weight for weight, *_ in made])
        return super().start(made)


def test_the_next_block_is_fetched_while_one_computes(pipeline):
    unet, copier = share_weights(pipeline.unet), Counting()
    x, t, text = torch.randn(1, 2, 4, 4, 4), torch.tensor([5]), torch.randn(1, 3, unet.config.context_dim)
    with torch.no_grad():
        expected = unet(x, t, text)
        held = RestingWeights(unet, torch.device("cpu"), torch.float32, rest_device=torch.device("cpu"), copier=copier)
        torch.testing.assert_close(unet(x, t, text), expected, atol=1e-5, rtol=0)
        first = len(copier.asked)
        assert first == len(held.blocks), "nothing is known of the order yet: each is fetched as it is needed"
        waiting = []
        for block in held.blocks:
            block.register_forward_pre_hook(lambda block, _: waiting.append(held.pending and held.pending[0]))
        torch.testing.assert_close(unet(x, t, text), expected, atol=1e-5, rtol=0)
    assert len(copier.asked) == 2 * first, "nothing is fetched twice"
    assert sum(after is not None for after in waiting) == first - 1 and waiting[-1] is None
    assert held.pending is None and not held.active


def test_an_error_within_a_block_leaves_its_weights_at_rest(pipeline):
    unet = share_weights(pipeline.unet)
    held = RestingWeights(unet, torch.device("cpu"), torch.float32, storage=torch.bfloat16)
    with pytest.raises(RuntimeError), torch.no_grad():
        unet(torch.randn(1, 2, 4, 4, 4), torch.tensor([5]), torch.randn(1, 3, 1))  # text of another width
    matrices = [t for block in held.blocks for t in weights_of(block) if t.dim() > 1]
    assert matrices and all(t.dtype == torch.bfloat16 for t in matrices) and not held.active


def test_eight_bits_round_by_two_percent():
    weight = torch.randn(64, 128) * torch.logspace(-6, 2, 64)[:, None]
    small, scale = quantised(weight)
    error = (small.float() * scale - weight).norm(dim=1) / weight.norm(dim=1)
    assert small.dtype == FLOAT8 and error.max() < 0.035 and 0.02 < error.mean() < 0.028
    assert torch.equal(quantised(torch.zeros(2, 3))[0].float(), torch.zeros(2, 3))


def test_loras_are_fixed_with_weights_of_eight_bits(load, nano):
    pipe = load(weights_dtype="float8")
    with pytest.raises(UserError, match="fixed while weights rest in 8 bits"):
        pipe.load_lora(nano / "kohya.safetensors")
    with pytest.raises(UserError, match="cannot be saved"):
        pipe.save(nano / "never")
    with pytest.raises(UserError, match="cannot be moved"):
        pipe.to("cpu", torch.float16)


def test_what_a_call_cannot_change(pipeline):
    for options in ({"offload": "idle"}, {"weights_dtype": "float8"}, {"max_memory": "6GB"}):
        with pytest.raises(UserError, match="give it to from_config"):
            clip(pipeline, **options)


def test_weights_cannot_leave_the_cpu(nano, tmp_path):
    path = write_config(tmp_path / "run.yaml", entry(nano, offload="blocks"))
    with pytest.raises(UserError, match="offload: got blocks for the device cpu"):
        AnimateDiffPipeline.from_config(path, device="cpu")


def test_clips_of_v1_are_chunked_by_clips(load, nano):
    """Its norms pool over the frames of a clip, which stays whole."""
    pipe = load(motion_module=str(nano / "mm_v1.safetensors"))
    torch.testing.assert_close(clip(pipe, chunk_tokens=1), clip(pipe), atol=1e-3, rtol=0)


def test_chunks_reach_blocks(pipeline):
    set_chunk(pipeline.unet, 7)
    assert {block.chunk for block in find_blocks(pipeline.unet) if hasattr(block, "chunk")} == {7}
    set_chunk(pipeline.unet, 0)
    x = torch.randn(5, 3, 2, 2)
    assert torch.equal(in_parts(torch.sigmoid, 2, x), x.sigmoid())
    assert torch.equal(in_parts(torch.sigmoid, 2, x, dim=1), x.sigmoid())


# ---- tiles ------------------------------------------------------------------------------------------------------


def test_tiles_cover_and_fade():
    assert starts(64, 64, 8) == [0] and starts(100, 64, 4) == [0, 36] and starts(200, 64, 8) == [0, 48, 96, 136]
    assert ramp(8, True, False).tolist() == pytest.approx([1 / 3, 2 / 3, 1, 1, 1, 1, 1, 1])
    x = torch.randn(2, 3, 40, 24)
    grown = tiled(lambda part: part.repeat_interleave(2, 2).repeat_interleave(2, 3), x, 16, grow=2)
    torch.testing.assert_close(grown, x.repeat_interleave(2, 2).repeat_interleave(2, 3))
    pooled = tiled(lambda part: torch.nn.functional.avg_pool2d(part, 4), x, 16, shrink=4)
    torch.testing.assert_close(pooled, torch.nn.functional.avg_pool2d(x, 4))


def test_tiles_of_the_bundled_vae_are_near():
    image = load_base(ASSETS / "shapes.safetensors")
    pictures = torch.cat([torch.cat(list(clip[:2]), dim=-1)[None] for clip in World(2, seed=1).render(range(2))[0]])
    with torch.no_grad():
        whole = image.vae.decode_video(image.vae.encode_video(pictures[None]))
        image.vae.tile = 64
        tiles = image.vae.decode_video(image.vae.encode_video(pictures[None]))
    assert whole.shape == tiles.shape == (1, 2, 3, 64, 128)
    error = (whole - tiles).abs()
    print(f"mean {error.mean() / 2:.4f}, most {error.max() / 2:.3f} of the range from black to white")
    assert 0 < error.mean() / 2 < 0.01


# ---- sizes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "size"),
    [("6GB", 6 * 10**9), ("6 GiB", 6 * 2**30), ("6000MB", 6 * 10**9), (" 5.5gb", 5_500_000_000), ("6G", 6 * 10**9)],
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["6", "GB", "-6GB", "6 parsecs", "0GB", "1e3GB", "6GB6", "nan GB", "9" * 10 + "GB", 6])
def test_sizes_that_are_none(text):
    with pytest.raises(UserError, match="expected"):
        parse_size(text)
