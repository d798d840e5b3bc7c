"""Prompt configs and inference configs: both official grammars, typed overrides, and what mistakes are called."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from animatediff.config.inference_yaml import load_inference_config
from animatediff.config.networks import MOTION_VERSIONS, ScheduleConfig
from animatediff.config.prompt_yaml import dump_config, load_config
from animatediff.config.request import Embedding, MotionLoRA
from animatediff.config.spellings import files, parse_assignments
from animatediff.utils import UserError

ROOT = Path(__file__).parents[2]
SHIPPED = sorted((ROOT / "configs/animate").glob("*.yaml"))

OFFICIAL_2024 = """
# motion module v3
- dreambooth_path: "models/DreamBooth_LoRA/some.safetensors"
  lora_model_path: ""
  lora_alpha: 0.6
  adapter_lora_path: "models/Motion_Module/adapter.ckpt"
  adapter_lora_scale: 1
  motion_module_lora_configs:
    - path:  "models/MotionLoRA/zoom.ckpt"
      alpha: 1.0
  inference_config: "configs/inference/inference-v3.yaml"
  motion_module: "models/Motion_Module/mm.ckpt"

  controlnet_config: "configs/inference/sparsectrl/image_condition.yaml"
  controlnet_path:   "models/SparseCtrl/scribble.ckpt"
  controlnet_image_indexs: [-1]
  controlnet_images: "a.png"
  normalize_condition_images: true

  seed: [18446744073709551615, 18368660165286593270]
  steps: 25
  guidance_scale: 8
  W: 384
  H: 256
  L: 16
  prompt:
    - "one"
    - "two, with: a colon"
  n_prompt:
    - "worst quality"

- motion_module: "models/Motion_Module/v1.ckpt"
  seed: -1
  steps: 20
  guidance_scale: 7.5
  random_seed: [5]
  prompt:
    - "three"
  n_prompt:
    - ""
"""

OFFICIAL_2023 = """
Tiger:
  base: "models/DreamBooth_LoRA/base.safetensors"
  path: "models/DreamBooth_LoRA/lora.safetensors"
  motion_module:
    - "models/Motion_Module/mm_sd_v14.ckpt"
    - "models/Motion_Module/mm_sd_v15.ckpt"
  seed: [1, 2]
  steps: 25
  guidance_scale: 7.5
  lora_alpha: 0.6
  prompt: ["a", "b"]
  n_prompt: ["x", "y"]
Cartoon:
  base: ""
  path: "models/DreamBooth_LoRA/model.safetensors"
  motion_module: "models/Motion_Module/mm_sd_v14.ckpt"
  prompt: ["c"]
"""


@pytest.fixture
def read(tmp_path: Path):
    def read(text: str, **overrides: object):
        (tmp_path / "run.yaml").write_text(text, encoding="utf-8")
        return load_config(tmp_path / "run.yaml", overrides)

    return read


def test_official_list(read):
    config = read(OFFICIAL_2024)
    first, second = config.entries
    assert config.name == "run" and first.output.name == "1"
    assert first.model.motion_loras == (MotionLoRA("models/MotionLoRA/zoom.ckpt", 1.0),)
    assert first.model.adapter_scale == 1.0 and isinstance(first.model.adapter_scale, float)
    assert first.sparsectrl.images == ("a.png",) and first.sparsectrl.frames == (-1,)
    assert first.per_prompt() == [
        ("one", "worst quality", 18446744073709551615),
        ("two, with: a colon", "worst quality", 18368660165286593270),
    ]
    assert (first.size.height, first.size.width, first.size.num_frames, first.sampling.steps) == (256, 384, 16, 25)
    assert second.per_prompt() == [("three", "", 5)]  # the recorded seed replaces -1
    assert second.size.num_frames == 16 and second.size.height is None  # the base model decides


def test_official_mapping_of_2023(read):
    v14, v15, cartoon = read(OFFICIAL_2023).entries
    assert v14.output.name == v15.output.name == "Tiger"
    assert (v14.model.motion_module[-7:], v15.model.motion_module[-7:]) == ("14.ckpt", "15.ckpt")
    assert v14.model.personalised.endswith("base.safetensors") and v14.model.loras[0].path.endswith("lora.safetensors")
    assert cartoon.model.personalised.endswith("model.safetensors") and cartoon.model.loras == ()
    assert v15.per_prompt() == [("a", "x", 1), ("b", "y", 2)]


def test_the_first_v3_configs(read):
    (entry,) = read("- domain_lora_scale: 0.5\n  adapter_lora_path: v3_sd15_adapter.ckpt\n  prompt: [a]\n").entries
    assert entry.model.adapter_scale == 0.5


def test_single_entry_and_empty_values(read):
    (entry,) = read("prompt: just one\nlora_model_path:\nn_prompt: bad\n").entries
    assert (
        entry.prompts.prompt == ("just one",) and entry.model.loras == () and entry.prompts.negative_prompt == ("bad",)
    )


def test_entries_that_share_values_by_anchor(read):
    first, second = read("- &all\n  prompt: [a]\n  steps: 3\n- <<: *all\n  prompt: [b]\n").entries
    assert (first.prompts.prompt, second.prompts.prompt) == (
        ("a",),
        ("b",),
    ) and first.sampling.steps == second.sampling.steps == 3


def test_resolved_config_reads_back(read, tmp_path):
    config = read(OFFICIAL_2024, prompt=['odd ${x} ${ {a|b}: "q" # no comment\nü'], seed=[2**64 - 1])
    path = tmp_path / "again.yaml"
    path.write_text(dump_config(config), encoding="utf-8")
    assert load_config(path).entries == config.entries


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- promt: [a]", "unknown key 'promt', the nearest known one is 'prompt'"),
        ("- prompt: [a]\n  guidance: 7", r"guidance: got 7, expected keys .*, or guidance_scale=7"),
        (
            "- prompt: [a]\n  windows: {x: 1}",
            "expected one of schedule, length, overlap, fuse, stride: correct",
        ),
        ("- prompt: [a]\n  l: 8", "unknown key 'l', the nearest known one is 'L'"),
        ("- steps: 5", "prompt is missing"),
        ("- prompt: []", "prompt: got an empty list"),
        ("- prompt: [a]\n  L:", "L: got no value, expected a whole number"),
        ("- prompt: [a]\n  steps: ten", "steps: got 'ten', expected a whole number"),
        ("- prompt: [a]\n  steps: 2.5", "steps: got 2.5, expected a whole number"),
        ("- prompt: [a]\n  steps: true", "steps: got true, expected a whole number"),
        ("- prompt: [a]\n  guidance_scale: .inf", "guidance_scale: got inf, expected a number"),
        ("- prompt: [a, 5]", r"prompt\[1\]: got 5, expected text"),
        ("- prompt: [a]\n  norm_over_frames: 1", "norm_over_frames: got 1, expected true or false"),
        (
            "- prompt: [a]\n  motion_module_lora_configs: [{path: x, alfa: 1}]",
            "nearest known one is 'alpha'",
        ),
        ("- prompt: [a]\n  motion_module_lora_configs: [{alpha: 1}]", "path is missing"),
        ("- prompt: [a, b, c]\n  n_prompt: [x, y]", "n_prompt: got 2 values for 3 prompts, expected 1 or 3"),
        ("- prompt: [a, b, c]\n  seed: [1, 2]", "seed: got 2 values for 3 prompts"),
        ("- prompt: [a]\n  seed: []", "seed: got 0 values for 1 prompt"),
        ("- prompt: [a]\n  seed: -2", "seed: got -2, expected 0 to"),
        ("- prompt: [a]\n  seed: 18446744073709551616", "seed: got 18446744073709551616"),
        ("- prompt: [a]\n  steps: 0", "steps: got 0, expected at least 1"),
        ("- prompt: [a]\n  L: 0", "L: got 0"),
        ("- prompt: [a]\n  H: 500", "H: got 500, expected a multiple of 8: use 496"),
        ("- prompt: [a]\n  W: 7", "W: got 7, expected at least 8"),
        ("- prompt: [a]\n  guidance_scale: -1", "guidance_scale: got -1"),
        ("- prompt: [a]\n  eta: 1.5", "eta: got 1.5"),
        ("- prompt: [a]\n  fps: 60", "fps: got 60 for gif, expected 0.002 to 50: use mp4 or webp"),
        ("- prompt: [a]\n  format: avi", "format: got 'avi', expected gif or mp4 or webp or png"),
        ("- prompt: [a]\n  version: v9", "version: got 'v9', expected one of v1, v2, v3"),
        ("- prompt: [a]\n  motion_module: []", "motion_module: got an empty list"),
        ("- prompt: [a]\n  path: x\n  dreambooth_path: y", "both path/base and dreambooth_path"),
        ("- prompt: [a]\n  adapter_lora_scale: 1\n  domain_lora_scale: 1", "both adapter_lora_scale and domain_lora"),
        ('- prompt: [a]\n  pretrained_model_path: ""', "pretrained_model_path: got none"),
        ("- prompt: [a]\n  prompt: [b]", "not valid YAML: .*duplicate key prompt"),
        ("- prompt: [a", "not valid YAML"),
        ("- prompt: {0: a, 16: b}", "prompt: got a keyframe at 16, expected 0 to 15, as the clip has 16 frames"),
        ("- prompt: a\n  prompt_map: {0: b}", "both prompt and prompt_map"),
        ("- prompt: {-1: a}", "prompt: got a keyframe at -1"),
        ("- prompt: {}", "prompt: got no keyframes"),
        ("- prompt: {first: a}", "prompt: got a keyframe at first, expected the number of a frame"),
        ("- prompt: {0: 5}", r"prompt\[0\]: got 5, expected text"),
        ("- prompt: 5", "prompt: got 5, expected text"),
        ("[]", "got no entries"),
        ("- just text", "entry 1: got 'just text'"),
        ("", "got no value, expected a list of entries"),
        ("entries: []\nprovenance: 5", "provenance: got 5"),
        ("entries: []\nstep: 1", "unknown key 'step', expected one of entries, provenance"),
    ],
)
def test_mistakes_are_named(read, text, message):
    with pytest.raises(UserError, match=message) as error:
        read(text)
    assert "\n" not in str(error.value) and "run.yaml" in str(error.value)


def test_an_entry_without_a_name_has_its_number(read):
    for nothing in ("", 'name: ""\n  ', "output: {name: }\n  "):
        assert read(f"- {nothing}prompt: a fox\n").entries[0].output.name == "1"
    with pytest.raises(UserError, match="output: got -inf, expected keys with values"):
        read("- output: -.inf\n  prompt: a fox\n")


def test_a_camera_before_the_size_is_known(read):
    (entry,) = read(
        "- camera: {path: c.ckpt, move: zoom_in}\n  motion_module: m.ckpt\n  prompt: a fox\n  size: {height: null}\n"
    ).entries
    assert entry.size.height is None


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match="nothere.yaml, which is no file"):
        load_config(tmp_path / "nothere.yaml")


def test_overrides_are_typed(read):
    pairs = parse_assignments(
        [
            "steps=10",
            "prompt=a fox: running, [fast] = yes",
            "guidance_scale=1e1",
            "seed=[18446744073709551615]",
            "motion_module_lora_configs=[{path: a.ckpt, alpha: -0.5}]",
            "norm_over_frames=true",
            "format=webp",
            "lora_model_path=12",
            "sampling.eta=0.5",
        ],
    )
    entry, _ = read(OFFICIAL_2024, **pairs).entries
    assert entry.sampling.steps == 10 and entry.prompts.prompt == ("a fox: running, [fast] = yes",)
    assert entry.sampling.guidance_scale == 10.0 and entry.sampling.seed == (18446744073709551615,)
    assert entry.model.motion_loras == (MotionLoRA("a.ckpt", -0.5),)
    assert entry.model.norm_over_frames is True and entry.output.format == "webp" and entry.model.loras[0].path == "12"
    assert entry.sampling.eta == 0.5
    assert parse_assignments(["prompt=[a, b]"]) == {"prompt": ["a", "b"]}


def test_a_new_prompt_takes_the_first_of_the_old_lists(read):
    entry, other = read(OFFICIAL_2024, prompt=["new"]).entries
    assert entry.per_prompt() == [("new", "worst quality", 18446744073709551615)]
    assert other.per_prompt() == [("new", "", -1)]


def test_new_timesteps_keep_none_of_the_old_steps(read):
    for steps in ({}, {"steps": 2}):
        entry, _ = read(OFFICIAL_2024, timesteps=[500, 10], **steps).entries
        assert entry.sampling.timesteps == (500, 10) and entry.sampling.steps == steps.get("steps")


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ("steps", "got argument 'steps', expected key=value"),
        ("stpes=3", "unknown key 'stpes', the nearest known one is 'steps'"),
        ("seed=[1", "seed: got '\\[1', expected a value such as"),
        ("windows.lenght=3", "unknown key 'windows.lenght', the nearest known one is 'windows.length'"),
        ("finish.scal=2", "unknown key 'finish.scal', the nearest known one is 'finish.scale'"),
        ("interpolate=2", "unknown key 'interpolate', expected finish.interpolate: correct"),
        ("scale=2", "unknown key 'scale', expected controlnet_scale or .* or finish.scale"),
        ("upscale=2", "unknown key 'upscale', expected finish.scale"),
        ("frames=20", "unknown key 'frames', expected L or "),
        ("lenght=2", "unknown key 'lenght', expected L or window_length"),
        ("motion_lora=foo", "unknown key 'motion_lora', expected motion_module_lora_configs"),
        ("denoise=0.5", "unknown key 'denoise', expected strength"),
        ("cfg=3", "unknown key 'cfg', expected guidance_scale"),
        ("controlnet.path=x", "unknown key 'controlnet.path', expected it in controlnet: controlnet={path: …}"),
        ("seeds=3", "unknown key 'seeds', the nearest known one is 'seed'"),
    ],
)
def test_bad_overrides(item, message):
    with pytest.raises(UserError, match=message):
        parse_assignments([item])


@pytest.mark.parametrize(("key", "name"), [("stepz", "finish.steps"), ("cfg", "finish.tile")])
def test_one_group_alone_is_offered(key, name):
    with pytest.raises(UserError, match=f"unknown key '{key}', expected .*{name}") as error:
        parse_assignments([f"{key}=2"], of="finish")
    assert "guidance_scale" not in str(error.value) and "pag_scale" not in str(error.value)


def test_prompts_with_keyframes(read):
    """Frames may be written as text, and the frame around every text is added where prompts are taken one by one."""
    text = "prompt:\n- {0: red, '12': blue}\n- still\nhead_prompt: a\ntail_prompt: b\nn_prompt: {0: x, 15: y}"
    (entry,) = read(text).entries
    assert entry.prompts.prompt == ({0: "red", 12: "blue"}, "still") and (entry.travel.loop, entry.size.num_frames) == (
        None,
        16,
    )
    travel, still = entry.per_prompt()
    assert travel == ({0: "a, red, b", 12: "a, blue, b"}, {0: "x", 15: "y"}, -1) and still[0] == "a, still, b"
    (entry,) = read("prompt: {0: red, 16: blue}", L=17).entries
    assert entry.prompts.prompt == ({0: "red", 16: "blue"},)
    assert read("prompt_map: {'0': red, '8': blue}").entries[0].prompts.prompt == ({0: "red", 8: "blue"},)
    for written, value in (("[{0: a, 8: b}]", [{0: "a", 8: "b"}]), ("{0: a, 8: b}", {0: "a", 8: "b"}), ("{a", "{a")):
        assert parse_assignments([f"prompt={written}"]) == {"prompt": value}


def test_embeddings(read):
    (entry,) = read("prompt: a\nembeddings: [a.pt, {path: b.pt, name: bad}]").entries
    assert entry.model.embeddings == (Embedding("a.pt"), Embedding("b.pt", "bad"))
    assert files(entry)["model.embeddings[1].path"].path == "b.pt"
    (entry,) = read("prompt: a", **parse_assignments(["embeddings=a.pt"])).entries
    assert entry.model.embeddings == (Embedding("a.pt"),)


def test_override_of_a_wrong_type(read):
    with pytest.raises(UserError, match="override: steps: got 'ten', expected a whole number"):
        read(OFFICIAL_2024, steps="ten")


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_configs(path):
    """Each loads, gives its own launch command, and names every file it needs."""
    config = load_config(path)
    header = re.match(r"(#.*\n)+", path.read_text(encoding="utf-8"))
    assert header and f"python scripts/animate.py --config configs/animate/{path.name}" in header[0]
    assert "Expected:" in header[0]
    for entry in config.entries:
        for name in (file.path for file in files(entry).values() if file.kind.kinds):
            assert name in header[0] or (ROOT / "animatediff/assets" / Path(name).name == ROOT / name)
        if entry.model.inference_config:
            load_inference_config(ROOT / entry.model.inference_config)


def test_shipped_set_is_complete():
    names = " ".join(path.stem for path in SHIPPED)
    for model in (
        "shapes",
        "toonyou",
        "lyriel",
        "majicmix",
        "rcnzcartoon",
        "realistic-vision-v1",
        "realistic-vision-v2",
    ):
        assert model in names
    assert "filmvelvia" in names and "tusun" in names
    moves = [entry.output.name for entry in load_config(ROOT / "configs/animate/motion-lora.yaml").entries]
    assert moves == "ZoomIn ZoomOut PanLeft PanRight TiltUp TiltDown RollingClockwise RollingAnticlockwise".split()


@pytest.mark.parametrize("version", ["v1", "v2", "v3"])
def test_inference_configs(version):
    config = load_inference_config(ROOT / f"configs/inference/inference-{version}.yaml")
    assert config.version == version
    assert config.build_schedule() == ScheduleConfig()
    config.check(MOTION_VERSIONS[version])
    for other in {"v1", "v2", "v3"} - {version}:
        with pytest.raises(UserError, match=f"describes a {version} module .* but the motion module is {other}"):
            config.check(MOTION_VERSIONS[other])
    with pytest.raises(UserError, match="temporal_position_encoding true, but the motion module is .* with false"):
        config.check(replace(MOTION_VERSIONS[version], positional_encoding=False))


def test_older_inference_config(tmp_path):
    """No steps_offset, no clip_sample, v1 by omission; a schedule of its own."""
    path = tmp_path / "old.yaml"
    path.write_text(
        "unet_additional_kwargs:\n  unet_use_cross_frame_attention: false\n  motion_module_mid_block: false\n"
        "noise_scheduler_kwargs:\n  beta_end: 0.02\n  beta_schedule: scaled_linear\n"
    )
    config = load_inference_config(path)
    assert config.version == "v1"
    assert config.build_schedule(ScheduleConfig(prediction_type="v_prediction")) == ScheduleConfig(
        beta_end=0.02, beta_schedule="scaled_linear", prediction_type="v_prediction"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("unet_additional_kwargs: {motion_module_deco5der_only: false}", "nearest .* 'motion_module_decoder_only'"),
        ("unet_additional_kwargs: {motion_module_decoder_only: true}", "got true, expected false"),
        (
            "unet_additional_kwargs: {motion_module_kwargs: {attention_block_types: [Temporal_Cross]}}",
            "got 'Temporal_Cross', expected Temporal_Self",
        ),
        ("noise_scheduler_kwargs: {beta_strt: 1}", "'beta_strt', the nearest known one is 'beta_start'"),
        ("noise_schedule: {a: 1}", "nearest known one is 'noise_scheduler_kwargs'"),
    ],
)
def test_inference_config_mistakes(tmp_path, text, message):
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        load_inference_config(tmp_path / "bad.yaml")
