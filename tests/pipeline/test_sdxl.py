"""SDXL, alone and with its two motion modules, from files and prompts to frames, and with all that is built on it."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from animatediff.config.networks import SDXL_TURBO, recipe_of
from animatediff.config.spellings import build_request
from animatediff.diffusion.schedule import NoiseSchedule
from animatediff.features.micro_conditioning import time_ids
from animatediff.media.video import read_video
from animatediff.pipeline.pipeline import AnimateDiffPipeline
from animatediff.pipeline.prompts import encode_prompts
from animatediff.pipeline.resolve import Facts, resolve
from animatediff.utils import UserError
from scripts.animate import main
from tests.checkpoints.synthetic import write
from tests.models.test_golden import assert_close
from tests.nano import write_config
from tests.sdxl import FOLDER, GOLDEN, METADATA, motion, refiner, write_files

with safe_open(FOLDER / "expected.safetensors", "pt") as opened:
    NEGATIVE, PROMPT = json.loads(opened.metadata()["prompts"])
SIZE = {"height": 64, "width": 96}
TEXT = {"prompt": PROMPT, "negative_prompt": NEGATIVE}


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    return write_files(tmp_path_factory.mktemp("sdxl"))


def entry(files: Path, version: str = "", **values: object) -> dict[str, object]:
    """One entry of a prompt config for clips of 64 x 96 pixels."""
    motion = {"motion_module": str(files / f"{version}.safetensors")} if version else {}
    base = {"pretrained_model_path": str(files / "sdxl.safetensors"), "prompt": PROMPT, "H": 64, "W": 96, "seed": 3}
    return base | motion | values


@pytest.fixture(scope="module")
def pipelines(files) -> dict[str, AnimateDiffPipeline]:
    configs = {name: write_config(files / f"{name or 'image'}.yaml", entry(files, name)) for name in VERSIONS}
    return {name: AnimateDiffPipeline.from_config(path, device="cpu") for name, path in configs.items()}


VERSIONS = ("", "sdxl-beta", "hotshot-xl")
RUNS = {  # a golden run -> motion module, start noise, how it is called
    "beta": ("sdxl-beta", "noise", TEXT | {"guidance_scale": 8.0}),
    "beta_ddim": ("sdxl-beta", "noise", TEXT | {"guidance_scale": 8.0, "sampler": "ddim"}),
    "beta_zero_negative": ("sdxl-beta", "noise", {"prompt": PROMPT, "guidance_scale": 8.0}),
    "image": ("", "image_noise", {"prompt": PROMPT}),
    "hotshot": ("hotshot-xl", "hotshot_noise", TEXT | {"guidance_scale": 8.0, "sampler": "euler"}),
    "hotshot_euler_ancestral": ("hotshot-xl", "hotshot_noise", TEXT | {"guidance_scale": 8.0}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_golden_runs(pipelines, name):
    """What a call leaves open is the family's own: sampler, betas, guidance 5 of images, Hotshot-XL's sizes."""
    version, noise, options = RUNS[name]
    latents, generator = GOLDEN[f"input.{noise}"], torch.Generator().manual_seed(1)
    got = pipelines[version](
        **options, **SIZE, num_frames=latents.shape[2], num_inference_steps=10, latents=latents, generator=generator,
        output_type="latent",
    ).frames  # fmt: skip
    assert_close(got, GOLDEN[f"pipeline.{name}.latents"], 1e-4)


@pytest.mark.parametrize(
    ("version", "name", "noise", "options"),
    [
        ("sdxl-beta", "beta", "noise", {}),
        pytest.param("hotshot-xl", "hotshot", "hotshot_noise", {"sampler": "euler"}, marks=pytest.mark.slow),
    ],
)
def test_golden_frames_through_the_command_line(files, pipelines, tmp_path, monkeypatch, version, name, noise, options):
    noise, latents = (GOLDEN[key].movedim(1, 2) for key in (f"input.{noise}", f"pipeline.{name}.latents"))
    monkeypatch.setattr("animatediff.pipeline.sample.draw_noise", lambda generators, shape: noise.clone())
    values = {"L": noise.shape[1], "steps": 10, "guidance_scale": 8.0, "n_prompt": NEGATIVE, "format": "png"}
    config = write_config(tmp_path / "xl.yaml", entry(files, version, **values, **options))
    main(["--config", str(config), "--device", "cpu", "--output-dir", str(tmp_path / "out")])
    (clip,) = (tmp_path / "out" / "sample").iterdir()
    with torch.no_grad():
        frames = pipelines[version].model.vae.decode_video(latents)[0]
    expected = (frames / 2 + 0.5).clamp(0, 1).movedim(1, -1) * 255
    assert (read_video(clip)[0].float() - expected).abs().max() < 0.51 + 255e-4  # rounding, and a run's tolerance


def test_loras_and_words_of_a_config_reach_all_networks(files, tmp_path, pipelines):
    word = tmp_path / "vixen.safetensors"
    generator = torch.Generator().manual_seed(0)
    write(word, {"clip_l": torch.randn(2, 24, generator=generator), "clip_g": torch.randn(2, 40, generator=generator)})
    values = {"lora_path": str(files / "kohya.safetensors"), "lora_alpha": 0.6, "embeddings": [str(word)]}
    config = write_config(tmp_path / "xl.yaml", entry(files, "sdxl-beta", **values))
    pipeline = AnimateDiffPipeline.from_config(config, device="cpu")
    reports = "\n".join(pipeline.model.reports)
    assert "lora kohya: applied 1248 of 1248 keys" in reports and "2 vectors, in prompts as vixen" in reports
    plain = pipelines["sdxl-beta"].model
    for name in ("unet", "text_encoder", "text_encoder_2"):
        ours, theirs = (dict(getattr(m, name).named_parameters()) for m in (pipeline.model, plain))
        changed = [key for key in theirs if ours[key].shape != theirs[key].shape or not ours[key].equal(theirs[key])]
        assert any("token_embedding" in key for key in changed) == (name != "unet") and len(changed) > 10, name
    known, other = (sample(pipeline, prompt=prompt) for prompt in ("a vixen", "a fox"))
    assert torch.isfinite(known).all() and (known - other).norm() > 1e-3 * other.norm()


def test_the_refiner_refines(files, tmp_path):
    path = write(tmp_path / "refiner.safetensors", refiner(), **METADATA)
    config = write_config(tmp_path / "refine.yaml", entry(files, pretrained_model_path=str(path)))
    pipeline = AnimateDiffPipeline.from_config(config, device="cpu")
    once, again, worse = (
        sample(pipeline, video=PICTURE.expand(4, -1, -1, -1), strength=0.7, aesthetic_score=score)
        for score in (6.0, 6.0, 2.0)
    )
    assert torch.equal(once, again) and (once - worse).norm() > 1e-3 * once.norm()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(files, plain, dtype):
    """Guidance 8.5 makes 16 of each call's rounding, half an eps, and 3 steps add theirs up."""
    pipeline = AnimateDiffPipeline.from_config(files / "sdxl-beta.yaml", device="cpu", dtype=dtype)
    got = sample(pipeline)
    assert got.dtype == torch.float32 and torch.isfinite(got).all()
    assert_close(got, plain, 3 * 16 * torch.finfo(getattr(torch, dtype)).eps / 2)


OFFICIAL_INFERENCE = """
unet_additional_kwargs:
  unet_use_cross_frame_attention: false
  unet_use_temporal_attention: false
  use_motion_module: true
  motion_module_resolutions: [1, 2, 4, 8]
  motion_module_mid_block: false
  motion_module_decoder_only: false
  motion_module_type: Vanilla
  motion_module_kwargs: {num_attention_heads: 8, num_transformer_block: 1,
    attention_block_types: [Temporal_Self, Temporal_Self], temporal_position_encoding: true,
    temporal_position_encoding_max_len: 32, temporal_attention_dim_div: 1, zero_initialize: true}
noise_scheduler_kwargs: {num_train_timesteps: 1000, beta_start: 0.00085, beta_end: 0.020, beta_schedule: scaled_linear}
"""


@pytest.mark.slow
def test_the_official_branchs_files_and_spellings(files, tmp_path):
    """Its prompt YAML is one flat mapping; its inference YAML does not know v1's and v3's norms."""
    inference = tmp_path / "inference.yaml"
    inference.write_text(OFFICIAL_INFERENCE)
    values = {
        "base_model_path": str(files / "sdxl.safetensors"),
        "motion_module_path": str(files / "sdxl-beta.safetensors"),
        "inference_config": str(inference),
        "prompt": [PROMPT],
        "n_prompt": [NEGATIVE],
    }
    (tmp_path / "official.yaml").write_text(json.dumps(values | SIZE))
    pipeline = AnimateDiffPipeline.from_config(tmp_path / "official.yaml", device="cpu")
    assert pipeline.model.unet.config.motion.version == "sdxl-beta"
    assert pipeline.model.schedule == recipe_of("sdxl-beta", sdxl=True).schedule
    stripped = write(tmp_path / "stripped.safetensors", motion("sdxl-beta", positions=False))
    (tmp_path / "stripped.yaml").write_text(json.dumps(values | SIZE | {"motion_module_path": str(stripped)}))
    with pytest.raises(UserError, match="add `version: hotshot-xl` or `version: sdxl-beta`"):
        AnimateDiffPipeline.from_config(tmp_path / "stripped.yaml", device="cpu")
    named = AnimateDiffPipeline.from_config(tmp_path / "stripped.yaml", device="cpu", version="sdxl-beta")
    assert named.model.unet.config.motion.norm_over_frames


# ---- everything that is built on: each changes the clip, and none breaks it ---------------------------------------

SHORT = SIZE | {"num_frames": 4, "num_inference_steps": 3, "output_type": "latent"}


def sample(pipeline: AnimateDiffPipeline, **options: object) -> torch.Tensor:
    """Latents of a short clip (1, 4, f, 8, 12)."""
    return pipeline(**TEXT | SHORT | options, generator=torch.Generator().manual_seed(5)).frames


@pytest.fixture(scope="module")
def plain(pipelines) -> torch.Tensor:
    return sample(pipelines["sdxl-beta"])


PICTURE = 2 * torch.rand(3, 64, 96, generator=torch.Generator().manual_seed(0)) - 1
FEATURES = {
    "windows": {"windows": {"schedule": "open", "length": 3}},
    "looping windows": {"windows": {"schedule": "uniform", "length": 3}},
    "prompt travel": {"prompt": {0: PROMPT, 3: "snow"}},
    "weights": {"prompt": f"({PROMPT}:1.3)", "prompt_weighting": True},
    "a long prompt": {"prompt": f"{PROMPT}, " * 12},
    "clip skip": {"clip_skip": 3},
    "img2vid": {"image": PICTURE},
    "vid2vid": {"video": PICTURE.expand(4, -1, -1, -1), "strength": 0.6},
    "inversion": {"video": PICTURE.expand(4, -1, -1, -1), "strength": 1.0, "inversion": True},
    "FreeInit": {"freeinit": {"iterations": 2}},
    "FreeNoise": {"noise_type": "shuffle", "windows": {"schedule": "open", "length": 3}},
    "FreeU": {"freeu": {"b1": 1.3, "b2": 1.4, "s1": 0.9, "s2": 0.2}},
    "PAG": {"pag_scale": 2.0},
    "motion scale": {"motion_scale": 0.5},
    "pe stretch": {"pe_stretch": 2.0},
    "rescaled guidance": {"guidance_rescale": 0.7},
    "rotating loop": {"loop": "rotate"},
    "sizes": {"original_size": (32, 48), "crop": (8, 0), "target_size": (128, 192)},
    **{name: {"sampler": name} for name in ("ddim", "euler_ancestral", "dpmpp_2m", "pndm", "lcm")},
}


QUICK = ("windows", "prompt travel", "vid2vid", "FreeInit", "FreeU", "sizes", "euler_ancestral")  # the rest is slow


@pytest.mark.parametrize(
    "name", [*QUICK, *(pytest.param(n, marks=pytest.mark.slow) for n in FEATURES if n not in QUICK)]
)
def test_everything_of_the_seam_works_on_it(pipelines, plain, name):
    got = sample(pipelines["sdxl-beta"], **FEATURES[name])
    assert got.shape == plain.shape and torch.isfinite(got).all()
    same = name == "ddim"  # what euler computes, too
    assert ((got - plain).norm() > 1e-3 * plain.norm()) != same


@torch.no_grad()
def test_embeddings_of_a_call_come_with_pooled_ones(pipelines, plain):
    pipeline = pipelines["sdxl-beta"]
    request = pipeline.request_for(TEXT | {"height": 64, "width": 96, "num_frames": 4})
    context, negative = encode_prompts(pipeline.model, request)
    embeds = {
        "prompt": None,
        "negative_prompt": None,
        "prompt_embeds": context.tokens,
        "pooled_prompt_embeds": context.pooled[:, 0],
        "negative_prompt_embeds": negative.tokens,
        "negative_pooled_prompt_embeds": negative.pooled[:, 0],
    }
    assert_close(sample(pipeline, **embeds), plain)
    with pytest.raises(UserError, match="prompt_embeds: got no pooled vectors, expected both"):
        sample(pipeline, **embeds | {"pooled_prompt_embeds": None})


# ---- what a request leaves open ------------------------------------------------------------------------------------


def resolved(version: str, *, sdxl: bool = True, refiner: bool = False, **values: object):
    recipe = recipe_of(version, sdxl=sdxl)
    facts = Facts(recipe.schedule, recipe=recipe, sdxl=sdxl, refiner=refiner)
    return resolve(build_request({"prompt": "a", **values}, where="test"), facts)


def test_turbo_is_made_for_small_pictures():
    recipe = recipe_of("sdxl-beta", sdxl=True)
    turbo = Facts(recipe.schedule, SDXL_TURBO, recipe=recipe, sdxl=True)
    request = resolve(build_request({"prompt": "a", "W": 64}, where="test"), turbo)
    assert (request.size.height, request.size.width) == (512, 64)


@pytest.mark.parametrize(
    ("version", "sdxl", "size", "sampler", "steps", "guidance"),
    [
        ("v3", False, (512, 512), "ddim", 25, 7.5),
        ("", True, (1024, 1024), "euler", 50, 5.0),
        ("sdxl-beta", True, (1024, 1024), "euler", 100, 8.5),
        ("hotshot-xl", True, (384, 672), "euler_ancestral", 30, 5.0),
    ],
)
def test_each_family_has_its_own_defaults(version, sdxl, size, sampler, steps, guidance):
    r = resolved(version, sdxl=sdxl)
    assert (r.size.height, r.size.width) == size
    assert (r.sampling.sampler, r.sampling.steps, r.sampling.guidance_scale) == (sampler, steps, guidance)
    given = resolved(version, sdxl=sdxl, H=64, W=96, steps=7, guidance_scale=2, sampler="dpmpp_2m")
    assert (given.size.height, given.size.width, given.sampling.steps) == (64, 96, 7)
    assert given.sampling.sampler == "dpmpp_2m"


@pytest.mark.parametrize("betas", ["beta", "image"])
def test_betas_are_the_motion_modules(betas):
    recipe = recipe_of("sdxl-beta" if betas == "beta" else "hotshot-xl", sdxl=True)
    assert_close(NoiseSchedule(recipe.schedule).alphas_cumprod, GOLDEN[f"schedule.{betas}.alphas_cumprod"], 1e-6)
    for steps in (10, 25, 100):
        expected = GOLDEN[f"schedule.{betas}.timesteps.{steps}"].tolist()
        assert NoiseSchedule(recipe.schedule).timesteps(steps).tolist() == expected


def test_numbers_are_those_of_the_clip_and_hotshots_have_width_first():
    beta, hotshot = (recipe_of(version, sdxl=True) for version in ("sdxl-beta", "hotshot-xl"))
    small = {"H": 64, "W": 96}
    assert time_ids(resolved("sdxl-beta", **small), beta) == [64, 96, 0, 0, 64, 96]
    given = small | {"original_size": [768, 1024], "crop": [16, 48]}
    assert time_ids(resolved("sdxl-beta", **given), beta) == [768, 1024, 16, 48, 64, 96]
    assert time_ids(resolved("hotshot-xl", **small), hotshot) == [1920, 1080, 0, 0, 512, 512]
    assert time_ids(resolved("hotshot-xl", **given), hotshot) == [1024, 768, 48, 16, 512, 512]
    assert time_ids(resolved("", **small, refiner=True), beta, score=6.0) == [64, 96, 0, 0, 6.0]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sdxl": False, "original_size": [8, 8]}, "original_size needs SDXL as the base"),
        ({"aesthetic_score": 7}, "aesthetic_score needs SDXL's refiner as the base"),
        ({"refiner": True, "target_size": [8, 8]}, "target_size needs SDXL as the base, not its refiner"),
    ],
)
def test_numbers_that_the_model_does_not_know_are_refused(values, message):
    with pytest.raises(UserError, match=message):
        resolved("", **values)


def test_an_empty_negative_prompt_is_not_none():
    assert build_request({"prompt": "a", "n_prompt": ""}, where="test").prompts.negative_prompt == ("",)
    none = build_request({"prompt": "a"}, where="test")
    assert none.prompts.negative_prompt == () and none.per_prompt() == [("a", "", -1)]
