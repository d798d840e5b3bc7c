"""One table of what options must not say: the same message from a YAML, from the command line and from a call."""

import json

import pytest
import yaml

from animatediff.config.prompt_yaml import load_config
from animatediff.config.spellings import build_request, parse_assignments
from animatediff.utils import UserError

VIDEO = "clip.gif"
# options by flat names -> what the message says
TABLE = [
    ({"steps": 0}, "steps: got 0, expected at least 1"),
    ({"num_inference_steps": 2.5}, "num_inference_steps: got 2.5, expected a whole number"),
    ({"guidance_scale": -2}, "guidance_scale: got -2, expected at least 0"),
    ({"eta": 1.5}, "eta: got 1.5, expected at most 1"),
    ({"height": 20}, "height: got 20, expected a multiple of 8: use 16"),
    ({"W": 0}, "W: got 0"),
    ({"L": 0}, "L: got 0, expected at least 1"),
    ({"H": 80000}, "H: got 80000, expected at most 16384"),
    ({"L": 10**400}, "L: got 1000"),
    ({"pe_stretch": 10**19}, "pe_stretch: got 10000000000000000000, expected at most 1000"),
    ({"clip_skip": 0}, "clip_skip: got 0, expected at least 1"),
    ({"seed": 2**64}, "seed: got 18446744073709551616, expected 0 to"),
    ({"sampler": "heun"}, "sampler: got 'heun', expected one of ddim"),
    ({"timestep_spacing": "even"}, "timestep_spacing: got 'even', expected one of leading"),
    ({"guidance_rescale": 2}, "guidance_rescale: got 2, expected at most 1"),
    ({"pag_scale": -1}, "pag_scale: got -1, expected at least 0"),
    ({"pag_layers": ["up_blocks"]}, "pag_layers needs a pag_scale above 0"),
    ({"freeinit": {"iterations": 10**9}}, "freeinit.iterations: got 1000000000, expected at most 100"),
    ({"freeinit": {"order": 10**400}}, "freeinit.order: got 1000"),
    ({"noise_type": "shufle"}, "noise_type: got 'shufle', expected random or shuffle"),
    ({"loop": "forever"}, "loop: got 'forever', expected rotate or pingpong"),
    ({"loop": "rotate", "windows": "open"}, "loop: got rotate with windows, expected one of them"),
    ({"motion_scale": {0: 1, 40: 0}}, "motion_scale: got a keyframe at frame 40, expected 0 to 15"),
    ({"motion_scale": 0.5, "motion_module": ""}, "motion_scale needs a motion_module: set motion_module, or remove"),
    ({"lora_schedule": {"0%": 1}}, "lora_schedule needs LoRAs to schedule: set lora_model_path"),
    ({"lora_schedule": 0.5}, "lora_schedule: got no percentages of the steps"),
    ({"strength": 0.5}, "strength needs something to start from"),
    ({"mask": "m.png"}, "mask needs a video: add video, or remove mask"),
    ({"video": VIDEO, "image": "i.png"}, "got both video and image, expected one of them"),
    ({"video": VIDEO, "extend": 4, "mask": "m.png"}, "got both extend and mask"),
    ({"video_stride": 2}, "video_stride needs a video"),
    ({"controlnet_images": ["a.png"]}, "controlnet_images needs a SparseCtrl encoder: set controlnet_path"),
    ({"window_overlap": 16, "window_schedule": "open"}, "window_overlap: got 16, expected 0 to 15"),
    ({"window_length": 8}, "window_length: got 8 without a window_schedule"),
    ({"window_stride": 2, "window_schedule": "open"}, "window_stride: got 2, expected 1, or more with"),
    ({"prompt_fixed_ratio": 1}, "prompt_fixed_ratio: got 1, expected less than 1"),
    ({"n_prompt": ["a", "b"]}, "n_prompt: got 2 values for 1 prompt, expected 1"),
    ({"fps": 60}, "fps: got 60 for gif, expected 0.002 to 50: use mp4 or webp"),
    ({"format": "avi"}, "format: got 'avi', expected gif or mp4 or webp or png"),
    ({"loop_count": 3, "format": "mp4"}, "loop_count: got 3 for mp4, expected 0"),
    ({"scheduler": "heun"}, "scheduler: got 'heun'"),
    ({"widht": 64}, "unknown (key|argument) 'widht', the nearest known one is 'width'"),
    ({"quality": "best"}, "unknown (key|argument) 'quality'"),
    ({"guidance": 7}, "guidance: got 7, expected keys with values .*or guidance_scale=7"),
    ({"H": 64, "height": 64}, "got both (H and height|height and H), expected one of them"),
    ({"timesteps": "soon"}, "timesteps: got 'soon', expected a number"),
]
NAMES = [" ".join(values) for values, _ in TABLE]
MODULE = {"prompt": "a fox", "motion_module": "module.safetensors"}


@pytest.mark.parametrize(("values", "message"), TABLE, ids=NAMES)
def test_from_a_yaml(tmp_path, values, message):
    path = tmp_path / "fox.yaml"
    path.write_text(yaml.safe_dump([MODULE | values]), encoding="utf-8")
    with pytest.raises(UserError, match=f"fox.yaml, entry 1: {message}"):
        load_config(path)


@pytest.mark.parametrize(("values", "message"), TABLE, ids=NAMES)
def test_from_the_command_line(tmp_path, values, message):
    path = tmp_path / "fox.yaml"
    path.write_text(yaml.safe_dump([{"prompt": "a fox", "motion_module": "m.safetensors"}]), encoding="utf-8")
    items = [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in values.items()]
    with pytest.raises(UserError, match=message):
        load_config(path, parse_assignments(items))


@pytest.mark.parametrize(("values", "message"), [row for row in TABLE if "motion_module" not in row[0]])
def test_from_a_call(pipeline, values, message):
    if set(values) & {"fps", "format", "loop_count"}:
        pytest.skip("a call writes no file")
    with pytest.raises(UserError, match=message):
        pipeline("a fox", **values)


def test_all_mistakes_at_once_under_the_names_that_were_typed():
    values = {"prompt": "a", "H": 500, "sampling": {"steps": 0}, "sampling.eta": 2, "windows": {"lenght": 3}}
    with pytest.raises(UserError) as error:
        build_request({k: v for k, v in values.items() if k != "windows"}, where="x")
    assert str(error.value).split("\n") == [
        "x: H: got 500, expected a multiple of 8: use 496",
        "x: sampling.steps: got 0, expected at least 1",
        "x: sampling.eta: got 2, expected at most 1",
    ] or sorted(str(error.value).split("\n")) == sorted([
        "x: sampling.steps: got 0, expected at least 1",
        "x: sampling.eta: got 2, expected at most 1",
        "x: H: got 500, expected a multiple of 8: use 496",
    ])  # fmt: skip
    with pytest.raises(UserError, match="windows: unknown key 'lenght', the nearest known one is 'length'"):
        build_request(values, where="x")


def test_flat_grouped_and_dotted_are_the_same():
    flat = {"prompt": "a", "H": 64, "num_inference_steps": 3, "window_schedule": "closed", "freeinit": True}
    grouped = {"prompts": {"prompt": "a"}, "size": {"height": 64}, "sampling": {"steps": 3}, "windows": "closed",
               "freeinit": {"iterations": 3}}  # fmt: skip
    dotted = {"prompts.prompt": "a", "size.height": 64, "sampling.steps": 3, "windows.schedule": "closed",
              "freeinit.iterations": 3}  # fmt: skip
    requests = [build_request(values, where="") for values in (flat, grouped, dotted)]
    assert requests[0] == requests[1] == requests[2]


@pytest.mark.parametrize("group", ["windows", "freeinit", "freeu"])
def test_a_switch_is_the_same_on_the_command_line(group):
    for said in (True, False):
        typed = parse_assignments([f"{group}={str(said).lower()}"])
        request = build_request(typed | {"prompt": "a"}, where="")
        assert request == build_request({group: said, "prompt": "a"}, where="")
        assert (getattr(request, group) is not None) == said
    request = build_request({"prompt": "a", "windows": True, "window_overlap": 3}, where="")
    assert (request.windows.schedule, request.windows.overlap) == ("open", 3)
