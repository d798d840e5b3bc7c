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


def advanced(guider: dict, **changes) -> dict:
    """The first graph by SamplerCustomAdvanced and its parts."""
    parts = {
        "3": node("SamplerCustomAdvanced", noise=["40", 0], guider=["41", 0], sampler=["42", 0], sigmas=["44", 0],
                  latent_image=["5", 0]),
        "40": node("RandomNoise", noise_seed=7),
        "41": guider,
        "42": node("KSamplerSelect", sampler_name="euler"),
        "43": node("BasicScheduler", model=["10", 0], scheduler="sgm_uniform", steps=12, denoise=1.0),
        "44": node("SplitSigmas", sigmas=["43", 0], step=3),
    }  # fmt: skip
    return picture(**parts | changes)


def test_a_sampler_in_parts():
    found = read(advanced(node("CFGGuider", model=["10", 0], positive=["6", 0], negative=["7", 0], cfg=3.5)))
    by_one_node = read(picture())
    wanted = {"seed": 7, "steps": 12, "guidance_scale": 3.5, "sampler": "euler", "timestep_spacing": "trailing"}
    assert found.values == by_one_node.values | {f"sampling.{name}": value for name, value in wanted.items()}
    assert found.wanted == by_one_node.wanted
    assert found.without == ["node SplitSigmas"]


def test_a_guider_without_a_negative_prompt():
    found = read(advanced(node("BasicGuider", model=["10", 0], conditioning=["6", 0])))
    assert found.values["sampling.guidance_scale"] == 1.0
    assert found.values["prompts.prompt"] == ["a fox, at night"] and found.values["prompts.negative_prompt"] == []
    assert found.without == ["node SplitSigmas"]


def test_parts_that_are_not_known_are_told():
    karras = node("KarrasScheduler", steps=9, sigma_max=14.6, sigma_min=0.03, rho=7.0)
    found = read(advanced(node("DualCFGGuider", cond1=["6", 0]), **{"42": node("SamplerLCM"), "43": karras}))
    assert found.values["sampling.timestep_spacing"] == "karras" and found.values["sampling.steps"] == 9
    assert {"cfg None", "sampler SamplerLCM", "a prompt that is put together by other nodes", "node DualCFGGuider"} <= {
        *found.without
    }


def drawn(nodes: dict, bypassed: dict | None = None) -> dict:
    """A prompt as the workflow that it came from: values in their order, links by numbers."""
    plain, links = [], []
    for number, one in _in_order(nodes).items():
        slots, values = [], []
        for name, value in one["inputs"].items():
            if isinstance(value, list):
                links.append([len(links) + 1, int(value[0]), value[1], int(number), len(slots), "X"])
                slots.append({"name": name, "type": "X", "link": len(links)})
            else:
                values += [value, "randomize"] if name in ("seed", "noise_seed") else [value]
        kind = one["class_type"]
        values = dict(one["inputs"]) if kind == "VHS_VideoCombine" else values
        mode = 4 if number in (bypassed or {}) else 0
        plain.append({"id": int(number), "type": kind, "mode": mode, "inputs": slots, "widgets_values": values})
    return {"last_node_id": 99, "nodes": plain, "links": links, "version": 0.4}


def test_a_workflow_says_what_its_prompt_says():
    for nodes in (picture(), clip(), advanced(node("CFGGuider", model=["10", 0], positive=["6", 0], negative=["7", 0],
                                                   cfg=3.5))):  # fmt: skip
        by_prompt, by_workflow = read(nodes), read(drawn(nodes))
        assert (by_workflow.values, by_workflow.wanted) == (by_prompt.values, by_prompt.wanted)
        assert by_workflow.without == by_prompt.without


def _in_order(nodes: dict) -> dict:
    """With the values of a schedule of prompts in the order in which its node has them."""
    schedule = nodes["6"]["inputs"] if nodes["6"]["class_type"] == "BatchPromptSchedule" else None
    if schedule is None:
        return nodes
    order = ("text", "clip", "max_frames", "print_output", "pre_text", "app_text")
    return nodes | {"6": node("BatchPromptSchedule", **{name: schedule.get(name, False) for name in order})}


def test_nodes_of_a_workflow_that_do_not_run():
    workflow = drawn(picture(), bypassed={"10"})
    assert [wanted.option for wanted in read(workflow).wanted] == ["model.embeddings", "model.base", "model.vae"]
    loader = {"id": 50, "type": "ControlNetLoader", "inputs": [], "widgets_values": ["pose.pth"]}
    apply = {"id": 51, "type": "ControlNetApply", "widgets_values": [1.0],
             "inputs": [{"name": "control_net", "link": 90}, {"name": "conditioning", "link": 91}]}  # fmt: skip
    workflow["nodes"] += [loader, apply]
    workflow["links"] += [[90, 50, 0, 51, 0, "X"], [91, 6, 0, 51, 1, "X"]]
    positive = next(s for n in workflow["nodes"] if n["id"] == 3 for s in n["inputs"] if s["name"] == "positive")
    workflow["links"].append([92, 51, 0, 3, 1, "X"])
    positive["link"] = 92
    found = read(workflow)
    assert found.values["prompts.prompt"] == ["a fox, at night"]
    assert {"node ControlNetApply", "node ControlNetLoader"} <= set(found.without)


@pytest.mark.parametrize(
    "workflow",
    [{"nodes": [], "links": [[1]]}, {"nodes": [{"id": 1, "type": "KSampler"}], "links": {}}, {"nodes": 3, "links": []},
     {"nodes": [{"id": [], "type": "KSampler", "inputs": [{"link": []}, 3], "widgets_values": [[], {}]}, 1, {}],
      "links": [[[], 1, 2, 3], [1, 1, 0, 1, 0, "X"]]}],
)  # fmt: skip
def test_broken_workflows_are_none(workflow):
    assert read(workflow) is None
