"""LoRAs that prompts name, in runs and calls."""

import shutil
from pathlib import Path

import pytest

from animatediff.config.prompt_yaml import RunConfig
from animatediff.media.video import read_metadata, read_video
from animatediff.pipeline.run import animate
from animatediff.pipeline.tagged_loras import with_tagged_loras
from animatediff.utils import UserError


@pytest.fixture(autouse=True)
def here(nano, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    for name in ("style", "other"):
        shutil.copy(nano / "kohya.safetensors", tmp_path / f"models/{name}.safetensors")
    return tmp_path


def loras(request) -> list[tuple[str, float]]:
    return [(Path(lora.path).stem, lora.scale) for lora in request.model.loras]


def test_prompts_with_other_loras_are_other_entries_in_the_same_order(make_entry):
    prompts = ["one <lora:style:0.5>", {0: "two", 1: "2 <lora:style:0.5>"}, "three", "four <lora:style>"]
    request = make_entry(
        prompt=prompts, prompt_weighting=True, seed=[1, 2, 3, 4], n_prompt=["a", "b", "c", "d"], name="x",
        head_prompt="<lora:other:1> best", lora_model_path="models/style.safetensors",
    )  # fmt: skip
    first, second, third = with_tagged_loras([request])
    assert first.prompts.prompt == ("one", {0: "two", 1: "2"}) and third.prompts.prompt == ("four",)
    assert loras(first) == [("style", None), ("other", 1.0), ("style", 0.5)]
    assert loras(second) == [("style", None), ("other", 1.0)] and loras(third)[2:] == [("style", 1.0)]
    assert [r.sampling.seed for r in (first, second, third)] == [(1, 2), (3,), (4,)]
    assert [r.prompts.negative_prompt for r in (first, second, third)] == [("a", "b"), ("c",), ("d",)]
    assert {r.prompts.head_prompt for r in (first, second, third)} == {"best"}


def test_one_seed_and_no_tags_stay(make_entry):
    plain = make_entry(prompt=["one", "two"], prompt_weighting=True)
    off = make_entry(prompt=["one <lora:style:1>"])
    assert with_tagged_loras([plain, off]) == [plain, off]
    tagged = make_entry(prompt=["one <lora:style:1>", "two"], prompt_weighting=True, n_prompt="bad")
    parts = with_tagged_loras([tagged])
    assert [(r.sampling.seed, r.prompts.negative_prompt) for r in parts] == [((42,), ("bad",))] * 2


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("a <lora:styl:1>", "entry x: prompt: there is no LoRA 'styl' under models.*: the nearest are style"),
        ("a <lora:style:much>", "entry x: prompt: got '<lora:style:much>', expected a number"),
        ({0: "a <lora:style:1>", 1: "b <lora:style:0>"}, "got LoRA 'style' with 1 and 0 in one clip, expected one"),
    ],
)
def test_mistakes_are_one_line(make_entry, prompt, message):
    with pytest.raises(UserError, match=message) as error:
        with_tagged_loras([make_entry(prompt=[prompt], prompt_weighting=True, name="x")])
    assert "\n" not in str(error.value)


def test_a_tag_is_what_a_list_is(make_entry):
    tagged = make_entry(prompt=["a fox <lora:style:0.6>"], prompt_weighting=True)
    loras = [{"path": "models/style.safetensors", "scale": 0.6}]
    assert with_tagged_loras([tagged]) == [make_entry(prompt=["a fox"], prompt_weighting=True, lora_model_path=loras)]


@pytest.mark.slow
def test_a_run_with_a_tag(make_entry, here):
    """It remembers the list, has the LoRA's effect, and can be taken up."""
    tagged = make_entry(prompt=["a fox <lora:style:0.6>"], prompt_weighting=True, name="1")
    animate(RunConfig("a", (tagged,)), output_dir=here / "a", device="cpu")
    animate(RunConfig("a", (tagged,)), output_dir=here / "a", device="cpu")
    animate(RunConfig("b", (make_entry(prompt=["a fox"], name="1"),)), output_dir=here / "b", device="cpu")
    with_it, without = (here / name / "sample/0-a-fox.gif" for name in "ab")
    assert (read_video(with_it)[0] != read_video(without)[0]).any()
    assert read_metadata(with_it)["model"]["loras"] == [{"path": "models/style.safetensors", "scale": 0.6}]


def test_a_call_refuses_tags(pipeline):
    with pytest.raises(UserError, match=r"prompt: got '<lora:style:1>', expected a prompt without LoRAs"):
        pipeline("a <lora:style:1>", prompt_weighting=True, num_frames=2, height=16, width=16, num_inference_steps=1)
