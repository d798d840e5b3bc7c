"""AUTOMATIC1111's settings in our words."""

import time

import pytest

from animatediff.config.foreign_settings import WantedFile
from animatediff.config.infotext import read_infotext

SD15 = """a cat on a (red:1.2) sofa, "quoted: text", steps: many
second line, <lora:my style v1:0.7>
Negative prompt: bad, blurry: very
lowres
Steps: 28, Sampler: DPM++ 2M Karras, CFG scale: 6.5, Seed: 4294967295, Size: 512x768, Model hash: 879db523c3, \
Model: dreamshaper_8, VAE hash: c6a580b13a, VAE: vae-ft-mse-840000-ema-pruned.ckpt, Clip skip: 2, \
Lora hashes: "my style v1: aabbccddeeff, other: 0011223344aa", TI hashes: "EasyNegative: c74b4e810b03", \
ADetailer model: "face, yolo: n", Version: v1.6.0"""
CLIP = """masterpiece, <lora:detail:0.5>
0: a fox sleeps
8: a fox wakes
best quality
Negative prompt: bad
Steps: 20, Sampler: Euler a, CFG scale: 7, Seed: 1, Size: 512x512, Model hash: 45dee52b, AnimateDiff: "enable: True, \
model: mm_sd_v15_v2.ckpt, video_length: 32, fps: 12, loop_number: 2, closed_loop: R-P, batch_size: 16, stride: 2, \
overlap: -1, interp: FILM, interp_x: 10, mm_hash: 69ed0f5f", Version: v1.9.4"""


def line(**fields: str) -> str:
    return "a fox\nSteps: 20, " + ", ".join(f"{name.replace('_', ' ')}: {value}" for name, value in fields.items())


def test_a_picture_with_lines_quotes_commas_and_colons():
    found = read_infotext(SD15)
    assert found.program == "AUTOMATIC1111"
    assert found.values == {
        "prompts.prompt": ['a cat on a (red:1.2) sofa, "quoted: text", steps: many\nsecond line,'],
        "prompts.negative_prompt": ["bad, blurry: very\nlowres"],
        "prompts.weighting": True,
        "prompts.clip_skip": 2,
        "sampling.steps": 28,
        "sampling.guidance_scale": 6.5,
        "sampling.seed": 4294967295,
        "sampling.sampler": "dpmpp_2m",
        "sampling.timestep_spacing": "karras",
        "size.width": 512,
        "size.height": 768,
        "size.num_frames": 1,
    }
    assert found.wanted == [
        WantedFile("model.loras", "my style v1", "aabbccddeeff", 0.7),
        WantedFile("model.base", "dreamshaper_8", "879db523c3"),
        WantedFile("model.vae", "vae-ft-mse-840000-ema-pruned.ckpt", "c6a580b13a"),
        WantedFile("model.embeddings", "EasyNegative", "c74b4e810b03"),
    ]
    assert found.without == ["ADetailer model face, yolo: n"]


def test_a_clip_that_travels():
    found = read_infotext(CLIP)
    values = found.values
    assert values["prompts.prompt"] == [{0: "a fox sleeps", 8: "a fox wakes"}]
    assert (values["prompts.head_prompt"], values["prompts.tail_prompt"]) == ("masterpiece", "best quality")
    assert {k: v for k, v in values.items() if k.startswith(("size.num", "output", "windows", "sampling.s"))} == {
        "sampling.sampler": "euler_ancestral",
        "sampling.steps": 20,
        "sampling.seed": 1,
        "size.num_frames": 32,
        "output.fps": 12.0,
        "output.loop_count": 2,
        "windows.schedule": "uniform",
        "windows.length": 16,
        "windows.stride": 2,
    }
    assert found.wanted == [
        WantedFile("model.loras", "detail", "", 0.5),
        WantedFile("model.base", "the image model", "45dee52b"),
        WantedFile("model.motion_module", "mm_sd_v15_v2.ckpt", "69ed0f5f"),
    ]
    assert found.without == ["AnimateDiff interp FILM"]


@pytest.mark.parametrize(
    ("sampler", "ours", "spacing", "told"),
    [
        ("Euler", "euler", "linspace", ""),
        ("Euler a", "euler_ancestral", "linspace", ""),
        ("DDIM", "ddim", "leading", ""),
        ("PLMS", "pndm", None, ""),
        ("LCM", "lcm", None, ""),
        ("DPM++ 2M", "dpmpp_2m", "linspace", ""),
        ("DPM++ 2M, Schedule type: Automatic", "dpmpp_2m", "karras", ""),
        ("DPM++ 2M, Schedule type: SGM Uniform", "dpmpp_2m", "trailing", ""),
        ("DPM++ SDE Karras", "euler_ancestral", "karras", "sampler DPM++ SDE Karras (taken: euler_ancestral, the near"),
        ("DPM++ 2M SDE Exponential", "dpmpp_2m", "karras", "sampler DPM++ 2M SDE Exponential (taken: dpmpp_2m, the n"),
        ("UniPC", "dpmpp_2m", "linspace", "sampler UniPC (taken: dpmpp_2m, the nearest)"),
        ("Nobody's", None, "linspace", "sampler Nobody's"),
    ],
)
def test_samplers(sampler, ours, spacing, told):
    found = read_infotext(line(Sampler=sampler, CFG_scale="7"))
    assert found.values.get("sampling.sampler") == ours
    assert found.values.get("sampling.timestep_spacing") == spacing
    assert found.without[0].startswith(told) if told else not found.without, found.without


def test_hires_fix_is_a_second_pass():
    """Of 10 steps that are run at strength 0.4; 0 of them are as many as the first pass has."""
    fields = {"Sampler": "Euler", "Denoising strength": "0.4", "Hires upscale": "1.5", "Hires steps": "10"}
    found = read_infotext(line(**fields, Hires_upscaler="R-ESRGAN 4x+"))
    assert {k: v for k, v in found.values.items() if k.startswith("finish")} == {
        "finish.scale": 1.5,
        "finish.strength": 0.4,
        "finish.steps": 25,
    }
    assert found.without == ["Hires upscaler R-ESRGAN 4x+ (taken: Lanczos; finish.upscaler names a model)"]
    of_latents = read_infotext(line(**fields, Hires_upscaler="Latent (bicubic)"))
    assert of_latents.values["finish.enlarge"] == "latents" and of_latents.without == []
    assert read_infotext(line(**fields, Hires_upscaler="Latent")).without == [
        "Hires upscaler Latent (taken: latents, bicubic)"
    ]
    assert read_infotext(line(**fields | {"Hires steps": "0"})).values["finish.steps"] == 50
    picture = read_infotext(line(Denoising_strength="0.4"))
    assert picture.without == ["Denoising strength 0.4"] and "finish.strength" not in picture.values


def test_ping_pong_and_one_line_from_exiftool():
    clip = "enable: True, model: m, video_length: 0, closed_loop: A"
    clip = f'a fox\\nNegative prompt: bad\\nSteps: 20, AnimateDiff: "{clip}"'
    found = read_infotext(clip)
    assert found.values["prompts.prompt"] == ["a fox"] and found.values["prompts.negative_prompt"] == ["bad"]
    assert found.values["size.num_frames"] == 16 and found.values["loop.mode"] == "pingpong"
    off = read_infotext(clip.replace("True", "False"))
    assert off.values["size.num_frames"] == 1 and all(w.option != "model.motion_module" for w in off.wanted)


def test_hashes_as_civitai_adds_them():
    hashes = '{"model": "879db523c3", "lora:my style": "aabbccddeeff", "embed:b": "001122334455", "vae": "c6a580b13a"}'
    found = read_infotext(f"a <lora:my style:1>\nSteps: 20, Seed: 3, Model: x, Hashes: {hashes}, Version: v1")
    assert {(w.option, w.digits) for w in found.wanted} == {
        ("model.loras", "aabbccddeeff"),
        ("model.base", "879db523c3"),
        ("model.vae", "c6a580b13a"),
        ("model.embeddings", "001122334455"),
    }
    assert found.without == [] and found.values["sampling.seed"] == 3


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (line(Seed="9" * 5000), "Seed 99999"),
        (line(Seed="-5"), "Seed: got -5, expected 0 to 2^64 - 1"),
        (line(Seed="NaN"), "Seed NaN"),
        (line(CFG_scale="inf"), "CFG scale: "),
        (line(Seed="1").replace("Steps: 20", "Steps: 0"), "Steps: got 0, expected at least 1"),
        (line(Size="512x999999"), "Size 512x999999: got 999999, expected at most 16384"),
        (line(Size="500x512"), "Size 500x512: got 500, expected a multiple of 8: use 496"),
        (line(Size="big"), "Size big"),
        (line(Clip_skip="-1"), "Clip skip: got -1"),
        ("a [cat:dog:0.5]\n" + line().split("\n")[1] + "Seed: 1", "prompt editing [cat:dog:0.5]"),
        ("a [cat|dog]\n" + line().split("\n")[1] + "Seed: 1", "prompt editing [cat|dog]"),
        ("a cat AND a dog\n" + line(Seed="1").split("\n")[1], "AND between prompts"),
        ("<lora:x:y>\n" + line(Seed="1").split("\n")[1], "got '<lora:x:y>', expected a number"),
        ("<hypernet:x:1>\n" + line(Seed="1").split("\n")[1], "hypernetwork <hypernet:x:1>"),
    ],
)
def test_what_our_options_cannot_hold_is_told(text, told):
    found = read_infotext(text)
    assert any(miss.startswith(told) for miss in found.without), found.without
    assert all(len(miss) <= 80 and "\n" not in miss for miss in found.without)


@pytest.mark.parametrize(
    "text", ["", "a fox", "Steps of it: 3", '{"prompt": "Steps: 3"}', "\n\n", "x\nNegative prompt: y"]
)
def test_other_texts_are_none(text):
    assert read_infotext(text) is None


def test_hostile_texts_take_no_time():
    begun = time.process_time()
    for text in ('a:"\\' * 50_000, "a" * 300_000, "a: " * 100_000, "a:" + '"' * 200_000, "[" * 200_000, "{" * 200_000):
        read_infotext(f"{text}\nSteps: 1, {text}")
        read_infotext(f"x\nSteps: 1, Hashes: {text}, AnimateDiff: {text}, Lora hashes: {text}, Seed: 1")
    assert time.process_time() - begun < 10
