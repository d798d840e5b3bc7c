"""The form: every option it shows is the config's, what it says is what a config says, mistakes stand beside fields."""

from dataclasses import replace
from pathlib import Path

import pytest

from animatediff.config.prompt_yaml import BUNDLED, load_config
from animatediff.config.spellings import all_options, as_values, build_request
from animatediff.page.fields import MORE, NEGATIVE, PROMPT, TRAVEL, form_fields
from animatediff.page.form import MAX_TEXT, Mistakes, fill_form, placed, read_form
from animatediff.utils import UserError

CONFIGS = sorted((Path(__file__).parents[2] / "configs/animate").glob("*.yaml"))


def first_prompt(request):
    (prompt, negative, seed), *_ = request.per_prompt()
    prompts = replace(
        request.prompts, prompt=(prompt,), negative_prompt=(negative,) * bool(negative), head_prompt="", tail_prompt=""
    )
    sampling = replace(request.sampling, seed=(seed,), random_seed=())
    return replace(request, prompts=prompts, sampling=sampling, output=replace(request.output, name=""))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_config_comes_back_from_the_form(path):
    for entry in load_config(path).entries:
        request = first_prompt(entry)
        back = as_values(read_form(fill_form(request)), changed_only=True)
        for group, value in as_values(request, changed_only=True).items():
            if group == "motion":  # the frames of its keyframes come back as text, as JSON has them
                value = {k: {str(f): s for f, s in v.items()} if isinstance(v, dict) else v for k, v in value.items()}
            assert back[group] == value


@pytest.fixture
def filled():
    return fill_form(load_config(BUNDLED).entries[0])


def test_fields_are_the_config_s():
    fields = form_fields()
    assert fields["size.height"].help.lower().startswith(all_options()["size.height"].help.lower())
    assert "a multiple of 8" in fields["size.height"].help
    assert (fields["sampling.eta"].least, fields["sampling.eta"].most) == (0, 1)
    assert fields["sampling.sampler"].choices[:3] == ("", "ddim", "euler")
    assert fields["controlnets.nets[0].start"].default == 0.0
    assert fields["model.loras[0].path"].kind is all_options()["model.loras"].files
    assert all(field.option in all_options() and field.help for field in fields.values())


@pytest.mark.parametrize(
    "values, place, sentence",
    [
        ({"size.height": "100"}, "size.height", "Got 100, expected a multiple of 8: use 96"),
        ({"size.height": "tall"}, "size.height", "Got 'tall', expected a whole number"),
        ({"sampling.steps": "2.5"}, "sampling.steps", "Got 2.5, expected a whole number"),
        ({"size.num_frames": 0}, "size.num_frames", "Got 0, expected at least 1"),
        ({"output.fps": -1}, "output.fps", "Got -1.0, expected more than 0"),
        ({"sampling.seed": "1, 2"}, "sampling.seed", "Got 2 values for 1 prompt, expected 1"),
        ({"sampling.seed": "[1"}, "sampling.seed", "Got '[1', expected a value"),
        ({"sampling.sampler": "magic"}, "sampling.sampler", "Got 'magic', expected one of"),
        ({"windows.length": 8}, "windows.length", "Got 8 without a window_schedule"),
        ({"windows.schedule": "open", "windows.overlap": "20"}, "windows.overlap", "Got 20, expected 0 to 15"),
        ({"inputs.strength": "0.5"}, "inputs.strength", "inputs.strength needs something to start from"),
        ({"inputs.extend": 4}, "inputs.extend", "needs a video"),
        ({"model.loras[0].scale": "0.5"}, "model.loras[0].path", "Choose a file"),
        ({"controlnets.nets[0].preprocessor": "canny"}, "controlnets.nets[0].path", "Choose a file"),
        (
            {"controlnets.nets[0].path": "a", "controlnets.nets[1].path": "b", "controlnets.nets[1].scale": "high"},
            "controlnets.nets[1].scale",
            "Got 'high', expected a number",
        ),
        (
            {"controlnets.nets[0].path": "a", "controlnets.nets[2].path": "c"},
            "controlnets.nets[1].path",
            "Got none before",
        ),
        ({"ip_adapters.adapters[1].path": "b"}, "ip_adapters.adapters[0].path", "Got none before the next one"),
        ({"sparsectrl.frames": "0, 4"}, "sparsectrl.frames", "needs a SparseCtrl encoder"),
        ({PROMPT: "  "}, PROMPT, "Say what to show."),
        ({PROMPT: "x" * (MAX_TEXT + 1)}, PROMPT, "Got 20001 characters"),
        ({TRAVEL: [[20, "b"]]}, PROMPT, "got a keyframe at 20, expected 0 to 15"),
        ({TRAVEL: [[0, "b"]]}, TRAVEL, "Got two texts for frame 0"),
        ({TRAVEL: [[None, "b"]]}, TRAVEL, "Got 'b' without a frame"),
        ({TRAVEL: [[3, "b"], [3.0, "c"]]}, TRAVEL, "Got frame 3 twice"),
        ({MORE: "stepz=3"}, MORE, "the nearest known one is 'steps'"),
        ({MORE: "steps"}, MORE, "expected key=value"),
        ({MORE: "steps=3"}, MORE, "sampling.steps has a field of its own"),
        ({MORE: "pag_layers=[down_blocks]"}, MORE, "needs a pag"),
        ({MORE: "freeinit.iterations=0"}, MORE, "Got 0, expected at least 1"),
    ],
)
def test_every_mistake_is_a_sentence_beside_its_field(filled, values, place, sentence):
    with pytest.raises(Mistakes) as error:
        read_form(filled | values)
    assert list(error.value.found) == [place]
    assert sentence.lower() in error.value.found[place].lower()


def test_all_mistakes_at_once(filled):
    with pytest.raises(Mistakes) as error:
        read_form(filled | {"size.height": "1", "size.width": "1", "sampling.guidance_scale": "-1"})
    assert set(error.value.found) == {"size.height", "size.width", "sampling.guidance_scale"}


def test_a_table_travels_from_the_prompt(filled):
    request = read_form(filled | {PROMPT: "a", TRAVEL: [[None, ""], [8, "b"], ["15", "c"], [float("nan"), None]]})
    assert request.prompts.prompt == ({0: "a", 8: "b", 15: "c"},)


def test_no_file_is_none(filled):
    """Gradio takes an empty path for the current folder."""
    media = [name for name, field in form_fields().items() if field.takes in ("media", "medias")]
    assert "finish.audio" in media and {filled[name] for name in media} == {None}


def test_entries_that_were_not_touched_are_none(filled):
    request = read_form(filled)
    assert request.controlnets.nets == request.ip_adapters.adapters == request.model.loras == ()
    assert request.windows is None


def test_several_controlnets_and_ip_adapters(filled):
    """As many as have fields come back in them, more by the last one."""
    nets = [{"path": f"{n}.safetensors", "images": ["a.png"], "scale": 0.5, "preprocessor": "canny"} for n in range(3)]
    adapters = [{"path": f"{n}.bin", "images": ["b.png", "c.png"], "layers": "style"} for n in range(2)]
    values = {"prompt": "a", "controlnets.nets": nets, "ip_adapters.adapters": adapters}
    request = build_request(values | {"ip_adapters.image_encoder": "clip"}, where="", check=False)
    there = fill_form(request)
    assert there[MORE] == "" and there["controlnets.nets[2].path"] == "2.safetensors"
    assert there["ip_adapters.adapters[1].images"] == ["b.png", "c.png"] and not there["ip_adapters.adapters[2].path"]
    again = read_form(there)
    assert (again.controlnets, again.ip_adapters) == (request.controlnets, request.ip_adapters)
    more = build_request(values | {"controlnets.nets": [*nets, nets[0]]}, where="", check=False)
    assert "controlnets.nets=" in fill_form(more)[MORE]


def test_what_has_no_field_comes_back_by_the_last_one():
    values = {
        "prompt": "a", "motion_module": "m", "freeu": True, "pag": {"scale": 3.0, "layers": ["down"]},
        "windows": "uniform", "windows.stride": 2, "n_prompt": [{0: "x", 3: "y"}],
        "model.loras": [f"{n}.safetensors" for n in range(6)],
    }  # fmt: skip
    request = build_request(values, where="", check=False)
    filled = fill_form(request)
    assert filled[NEGATIVE] == "" and "freeu=true" in filled[MORE].splitlines()
    assert as_values(read_form(filled), changed_only=True) == as_values(request, changed_only=True)


def test_a_line_about_no_field_stands_under_the_button():
    found = placed(UserError("got the cuda device, which is not there\nsize.height: got 3 pixels")).found
    assert found == {"": "Got the cuda device, which is not there", "size.height": "Got 3 pixels"}
