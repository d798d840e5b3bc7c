"""ComfyUI's graphs in our words."""

import json
import time

import pytest

from animatediff.config.comfy_prompt import read_prompt
from animatediff.config.foreign_settings import WantedFile


def node(kind: str, **inputs):
    return {"class_type": kind, "inputs": inputs}


def picture(**changes):
    """The graph that ComfyUI shows at first, with a LoRA, a VAE and a text from another node."""
    nodes = {
        "4": node("CheckpointLoaderSimple", ckpt_name="SD1.5\\dreamshaper_8.safetensors"),
        "10": node("LoraLoader", model=["4", 0], clip=["4", 1], lora_name="my style.safetensors", strength_model=0.7,
                   strength_clip=0.7),
        "5": node("EmptyLatentImage", width=512, height=768, batch_size=1),
        "6": node("CLIPTextEncode", text=["12", 0], clip=["11", 0]),
        "7": node("CLIPTextEncode", text="bad, embedding:EasyNegative", clip=["11", 0]),
        "11": node("CLIPSetLastLayer", clip=["10", 1], stop_at_clip_layer=-2),
        "12": node("String Literal", string="a fox, at night"),
        "3": node("KSampler", seed=18446744073709551615, steps=30, cfg=6.5, sampler_name="dpmpp_2m", scheduler="karras",
                  denoise=1.0, model=["10", 0], positive=["6", 0], negative=["7", 0], latent_image=["5", 0]),
        "13": node("VAELoader", vae_name="vae-ft-mse.safetensors"),
        "8": node("VAEDecode", samples=["3", 0], vae=["13", 0]),
        "9": node("SaveImage", images=["8", 0], filename_prefix="x"),
    }  # fmt: skip
    return nodes | changes


def clip():
    """The same with AnimateDiff-Evolved (first generation), windows, a MotionLoRA and a prompt that travels."""
    schedule = '"0": "a fox \\"sleeps\\"",\n"16": "a fox wakes"'
    return picture(**{
        "5": node("ADE_EmptyLatentImageLarge", width=512, height=512, batch_size=["20", 0]),
        "20": node("PrimitiveInt", value=32),
        "6": node("BatchPromptSchedule", text=schedule, clip=["11", 0], pre_text="best", app_text="", max_frames=32),
        "14": node("ADE_AnimateDiffLoaderGen1", model=["10", 0], model_name="v3_sd15_mm.ckpt",
                   beta_schedule="autoselect",
                   context_options=["15", 0], motion_lora=["16", 0]),
        "15": node("ADE_LoopedUniformContextOptions", context_length=16, context_stride=2, context_overlap=4,
                   closed_loop=True, fuse_method="pyramid"),
        "16": node("ADE_AnimateDiffLoRALoader", name="v2_lora_ZoomIn.ckpt", strength=0.8),
        "17": node("VHS_VideoCombine", images=["8", 0], frame_rate=12, loop_count=0, format="video/h264-mp4",
                   pingpong=False),
        "3": picture()["3"] | {"inputs": picture()["3"]["inputs"] | {"model": ["14", 0]}},
    })  # fmt: skip


def read(nodes):
    return read_prompt(json.dumps(nodes))


def test_a_picture():
    found = read(picture())
    assert found.program == "ComfyUI" and found.without == []
    assert found.values == {
        "sampling.seed": 2**64 - 1,
        "sampling.steps": 30,
        "sampling.guidance_scale": 6.5,
        "sampling.sampler": "dpmpp_2m",
        "sampling.timestep_spacing": "karras",
        "size.width": 512,
        "size.height": 768,
        "size.num_frames": 1,
        "prompts.prompt": ["a fox, at night"],
        "prompts.negative_prompt": ["bad, EasyNegative"],
        "prompts.weighting": True,
        "prompts.clip_skip": 2,
    }
    assert found.wanted == [
        WantedFile("model.embeddings", "EasyNegative"),
        WantedFile("model.loras", "my style.safetensors", "", 0.7),
        WantedFile("model.base", "SD1.5\\dreamshaper_8.safetensors"),
        WantedFile("model.vae", "vae-ft-mse.safetensors"),
    ]


def test_a_clip():
    found = read(clip())
    values = {k: v for k, v in found.values.items() if k.split(".")[0] in ("size", "windows", "output")}
    assert values == {
        "size.width": 512,
        "size.height": 512,
        "size.num_frames": 32,
        "windows.schedule": "uniform",
        "windows.length": 16,
        "windows.overlap": 4,
        "windows.stride": 2,
        "windows.fuse": "pyramid",
        "output.fps": 12.0,
    }
    assert found.values["prompts.prompt"] == [{0: 'best, a fox "sleeps"', 16: "best, a fox wakes"}]
    assert WantedFile("model.motion_module", "v3_sd15_mm.ckpt") in found.wanted
    assert WantedFile("model.motion_loras", "v2_lora_ZoomIn.ckpt", "", 0.8) in found.wanted
    assert found.without == []


def test_second_generation_nodes_and_a_second_sampler():
    nodes = clip() | {
        "14": node("ADE_UseEvolvedSampling", model=["10", 0], beta_schedule="lcm", m_models=["18", 0]),
        "18": node("ADE_ApplyAnimateDiffModelSimple", motion_model=["19", 0]),
        "19": node("ADE_LoadAnimateDiffModel", model_name="AnimateLCM_sd15_t2v.ckpt"),
        "30": node("KSampler", **picture()["3"]["inputs"] | {"latent_image": ["3", 0], "denoise": 0.5, "steps": 12}),
    }
    found = read(nodes)
    assert WantedFile("model.motion_module", "AnimateLCM_sd15_t2v.ckpt") in found.wanted
    assert found.values["sampling.steps"] == 30
    assert "another sampler, KSampler of 12 steps" in found.without and "beta_schedule lcm" in found.without


def test_nodes_that_take_both_sides_keep_them_apart():
    inputs = picture()["3"]["inputs"]
    control = node("ControlNetApplyAdvanced", positive=["6", 0], negative=["7", 0], control_net=["22", 0], strength=1.0)
    sampler = node("KSampler", **inputs | {"positive": ["21", 0], "negative": ["21", 1]})
    found = read(picture(**{"21": control, "22": node("ControlNetLoader", control_net_name="x"), "3": sampler}))
    assert found.values["prompts.prompt"] == ["a fox, at night"]
    assert found.values["prompts.negative_prompt"] == ["bad, EasyNegative"]
    assert {"node ControlNetApplyAdvanced", "node ControlNetLoader"} <= set(found.without)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"sampler_name": "dpmpp_2m_sde_gpu"}, "sampler dpmpp_2m_sde_gpu (taken: dpmpp_2m, the nearest)"),
        ({"scheduler": "beta"}, "schedule beta (taken: trailing, the nearest)"),
        ({"scheduler": "mine"}, "schedule mine"),
        ({"sampler_name": 3}, "sampler 3"),
        ({"denoise": 0.6}, "denoise 0.6"),
        ({"sampler_name": "lcm", "scheduler": "mine", "denoise": 0.6}, "denoise 0.6"),
        ({"seed": 2**70}, "seed: got 1180591620717411303424, expected 0 to 2^64 - 1, or -1 to draw one"),
        ({"seed": {}}, "seed {}"),
        ({"steps": ["99", 0]}, "steps None"),
        ({"cfg": "high"}, "cfg high"),
        ({"positive": "text"}, "a prompt that is put together by other nodes"),
        ({"latent_image": ["4", 0]}, "the pictures that it starts from"),
    ],
)
def test_what_has_no_counterpart_is_told(change, told):
    found = read(picture(**{"3": node("KSampler", **picture()["3"]["inputs"] | change)}))
    assert told in found.without, found.without


def test_links_that_lead_in_circles_or_nowhere():
    nodes = picture(
        **{"12": node("Text", text=["12", 0]), "4": node("Reroute", x=["4", 0]), "11": node("X", a=["6", 0])}
    )
    found = read(nodes)
    assert "prompts.prompt" in found.values and WantedFile("model.base", "the image model") in found.wanted


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", "{", "null",
        '{"1": 3}', '{"1": {"class_type": "KSampler"}}', '{"a": {"class_type": 1, "inputs": {}}}',
        '{"nodes": [], "links": []}', "[" * 100_000, '{"1":' * 50_000, '{"seed": ' + "9" * 5000 + "}",
        json.dumps({"1": node("CLIPTextEncode", text="x")}),
    ],
)  # fmt: skip
def test_other_texts_are_none(text):
    assert read_prompt(text) is None


def test_large_graphs_take_no_time():
    begun = time.process_time()
    chain = {str(i): node("X", a=[str(i + 1), 0], b=[str(i + 2), 0]) for i in range(100, 9000)}
    samplers = {f"s{i}": node("KSampler", **picture()["3"]["inputs"] | {"model": ["100", 0]}) for i in range(200)}
    assert read(picture(**chain, **samplers))
    assert time.process_time() - begun < 5
