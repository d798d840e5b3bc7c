"""Which sampler, at which timesteps, how strongly guided: as said, as a distilled module needs it, or by default."""

import pytest
import torch

from animatediff.config.networks import ANIMATE_LCM, ScheduleConfig, lightning
from animatediff.config.request import Sampling
from animatediff.config.spellings import build_request
from animatediff.diffusion.samplers import SAMPLERS
from animatediff.features.noise import seeded
from animatediff.pipeline.headers import check_requests
from animatediff.pipeline.resolve import Facts, plan_steps, resolve
from animatediff.utils import UserError
from tests.checkpoints.synthetic import lora_tensors, motion_tensors, with_positional, write

FOX = "a red fox"
CALL = {"num_frames": 2, "height": 64, "width": 64, "num_inference_steps": 3, "output_type": "latent"}


def complete(values, distilled=None) -> Sampling:
    """The sampling of a request with these options, for such a motion module."""
    request = build_request({"prompt": "a", **values}, where="")
    return resolve(request, Facts(ScheduleConfig(), distilled)).sampling


def chosen(sampling: Sampling) -> tuple:
    return sampling.sampler, sampling.timestep_spacing, sampling.steps, sampling.guidance_scale


def test_defaults():
    assert chosen(complete({"sampler": "", "steps": None})) == ("ddim", "leading", 25, 7.5)
    assert complete({"sampler": "lcm"}).timestep_spacing == "lcm"
    assert chosen(complete({"sampler": "lcm", "timestep_spacing": "trailing"})) == ("lcm", "trailing", 25, 7.5)
    assert complete({"timesteps": [900.0, 5.0]}).steps == 2
    unguided = complete({"guidance_scale": 0.0, "eta": 0.5})
    assert (unguided.guidance_scale, unguided.eta) == (0.0, 0.5)


def test_distilled_modules_choose_for_themselves():
    assert chosen(complete({}, ANIMATE_LCM)) == ("lcm", "lcm", 6, 2.0)
    assert chosen(complete({}, lightning(4))) == ("euler", "trailing", 4, 1.0)
    assert chosen(complete({"steps": 3}, lightning(2))) == ("euler", "trailing", 3, 1.0)  # as its authors advise
    asked = {"sampler": "euler", "steps": 4, "guidance_scale": 1.5}
    assert chosen(complete(asked, lightning(4))) == ("euler", "trailing", 4, 1.5)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (
            {"steps": 25},
            "steps: got 25, expected 4 with AnimateDiff-Lightning of 4 steps: set steps=4, or `version: v2`",
        ),
        ({"guidance_scale": 7.5}, "guidance_scale: got 7.5, expected at most 2 with .*: set guidance_scale=1.0"),
        ({"sampler": "ddim"}, "sampler: got ddim, expected euler"),
        ({"timestep_spacing": "leading"}, "timestep_spacing: got leading, expected trailing"),
        ({"timesteps": (999.0, 500.0)}, "steps: got 2, expected 4"),
    ],
)
def test_what_a_distilled_module_was_not_made_for(said, message):
    with pytest.raises(UserError, match=message) as error:
        complete(said, lightning(4))
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="steps: got 25, expected 1 to 16 with AnimateLCM: set steps=6"):
        complete({"steps": 25}, ANIMATE_LCM)


@pytest.fixture
def distilled(nano):
    """v2's network under the names that tell distilled modules apart, or without the positions that v2 has."""
    return {
        "lcm": write(nano / "renamed.safetensors", motion_tensors("v2")),
        "lightning": write(
            nano / "animatediff_lightning_2step_comfyui.safetensors", with_positional(motion_tensors("v2"), 32)
        ),
    }


def test_distilled_files_are_recognised(distilled, make_entry):
    """By the loader; what the entry says goes first, and `version: v2` turns the rules off."""
    open_entry = {"steps": None, "motion_module": str(distilled["lightning"])}
    (checked,) = check_requests([make_entry(**open_entry)])
    assert chosen(checked.request.sampling) == ("euler", "trailing", 2, 1.0)
    (checked,) = check_requests([make_entry(**open_entry | {"steps": 3})])  # what its authors advise
    assert chosen(checked.request.sampling) == ("euler", "trailing", 3, 1.0)
    (checked,) = check_requests([make_entry(steps=4, motion_module=str(distilled["lcm"]))])
    assert chosen(checked.request.sampling) == ("lcm", "lcm", 4, 2.0)
    assert checked.headers.distillation(checked.request) == ANIMATE_LCM
    with pytest.raises(UserError, match="entry test: guidance_scale: got 8.0, expected at most 2"):
        check_requests([make_entry(**open_entry, guidance_scale=8, name="test")])
    (checked,) = check_requests([make_entry(**open_entry, guidance_scale=8, version="v2")])
    assert chosen(checked.request.sampling) == ("ddim", "leading", 25, 8.0)
    assert checked.headers.distillation(checked.request) is None


@pytest.mark.parametrize(
    ("name", "said", "expected"),
    [
        ("lcm-lora-sdv1-5", {}, ("lcm", "lcm", 4, 1.0, ())),
        ("lcm-lora-sdv1-5", {"steps": 8, "guidance_scale": 1.5}, ("lcm", "lcm", 8, 1.5, ())),
        ("Hyper-SD15-1step-lora", {}, ("lcm", "lcm", 1, 1.0, (800.0,))),
        ("Hyper-SD15-1step-lora", {"steps": 4}, ("lcm", "lcm", 4, 1.0, ())),
        ("Hyper-SD15-8steps-CFG-lora", {}, ("ddim", "trailing", 8, 5.0, ())),
        ("Hyper-SD15-8steps-CFG-lora", {"version": "v3", "steps": 25}, ("ddim", "leading", 25, 7.5, ())),
    ],
)
def test_distilled_loras_are_recognised(nano, make_entry, name, said, expected):
    lora = write(nano / f"{name}.safetensors", lora_tensors("kohya_lora"))
    (checked,) = check_requests([make_entry(**{"steps": None, "lora_model_path": str(lora)} | said)])
    sampling = checked.request.sampling
    assert (*chosen(sampling), sampling.timesteps) == expected


def test_a_distilled_lora_says_what_it_was_not_made_for(nano, make_entry):
    lora = write(nano / "Hyper-SD15-4steps-lora.safetensors", lora_tensors("kohya_lora"))
    with pytest.raises(
        UserError, match="expected 4 with Hyper-SD of 4 steps .Hyper-SD15-4steps-lora.safetensors.: set steps=4, or"
    ):
        check_requests([make_entry(steps=25, lora_model_path=str(lora))])


def test_the_inference_config_has_a_say(nano, make_entry):
    path = nano / "trailing.yaml"
    path.write_text("noise_scheduler_kwargs: {timestep_spacing: trailing}\n")
    for said, spacing in (
        ({}, "trailing"),
        ({"sampler": "lcm"}, "trailing"),
        ({"timestep_spacing": "karras"}, "karras"),
    ):
        (checked,) = check_requests([make_entry(inference_config=str(path), **said)])
        assert checked.request.sampling.timestep_spacing == spacing


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"sampler": "dpmpp2m"},
            "sampler: got 'dpmpp2m', expected one of ddim, euler, euler_ancestral, dpmpp_2m",
        ),
        ({"timestep_spacing": "karas"}, "timestep_spacing: got 'karas', expected one of leading, trailing"),
        ({"sampler": "euler", "eta": 0.5}, "got eta 0.5 with the sampler euler, expected 0"),
        ({"timesteps": [10, 20]}, r"got timesteps \[10, 20\], expected falling numbers"),
        ({"timesteps": [20, 10, 1]}, "got 2 steps and 3 timesteps, expected as many: remove steps"),
        ({"sampler": "lcm", "steps": 101}, "got 101 steps, expected 1 to 100"),
    ],
)
def test_mistakes_are_named(make_entry, values, message):
    with pytest.raises(UserError, match=message) as error:
        check_requests([make_entry(**values)])
    assert "\n" not in str(error.value)


@pytest.fixture
def sample(pipeline):
    return lambda prompt=FOX, seed=3, **values: pipeline(prompt, **({"generator": seeded(seed)} | CALL | values)).frames


@pytest.mark.parametrize(
    "name", [n if n in ("ddim", "euler_ancestral") else pytest.param(n, marks=pytest.mark.slow) for n in SAMPLERS]
)
def test_a_batch_is_its_clips(sample, name):
    """Samplers that add noise take each clip's from its own generator."""
    both = sample([FOX, "snow"], generator=[seeded(3), seeded(4)], sampler=name)
    alone = sample("snow", 4, sampler=name)
    assert (both[1:] - alone).abs().max() < 1e-4 * alone.abs().max()


@pytest.mark.slow
def test_samplers_differ_where_they_should(sample):
    clips = {name: sample(sampler=name) for name in SAMPLERS}
    assert torch.allclose(clips["euler"], clips["ddim"])
    assert torch.equal(clips["euler_ancestral"], sample(eta=1.0))
    others = [clips[name] for name in SAMPLERS if name != "euler"]
    assert all(not torch.allclose(a, b, atol=1e-2) for i, a in enumerate(others) for b in others[:i])
    assert not torch.allclose(sample(timestep_spacing="trailing"), clips["ddim"], atol=1e-2)


def test_timesteps_and_sigmas(pipeline, sample):
    visited = []
    values = {"num_inference_steps": None, "callback_on_step_end": lambda *step: visited.append(step[2])}
    clip = sample(timesteps=[701, 301, 1], **values)
    assert visited == [701, 301, 1]
    sigmas = torch.tensor([2.2935409545898438, 0.4])  # of timestep 501 and one between two
    sample(sigmas=[*sigmas.tolist(), 0.0], **values)
    assert visited[3] == 501 and 101 < visited[4] < 104
    assert not torch.allclose(clip, sample(), atol=1e-2)
    with pytest.raises(UserError, match="got both timesteps and sigmas"):
        sample(timesteps=[1], sigmas=[1.0])
    with pytest.raises(UserError, match="sampler: got 'heun', expected one of ddim"):
        sample(sampler="heun")


def test_a_distilled_pipeline_asks_for_few_steps(pipeline, monkeypatch):
    monkeypatch.setattr(pipeline.model, "distillation", ANIMATE_LCM)
    steps = []
    pipeline(FOX, 1, 16, 16, generator=seeded(3), callback_on_step_end=lambda *step: steps.append(step[2]))
    timesteps = plan_steps(pipeline.request_for({"prompt": FOX}).sampling, ScheduleConfig())[1]
    assert len(steps) == 6 and steps == timesteps.tolist() and steps[0] == 999
    with pytest.raises(UserError, match="guidance_scale: got 7.5, expected at most 2 with AnimateLCM"):
        pipeline.infer(FOX, 1, 16, 16, guidance_scale=7.5, show_progress=False)
