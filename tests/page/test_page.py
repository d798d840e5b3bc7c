"""What the page's server does, without a browser: forms of several people to jobs, and back from clips."""

import re
import socket
import sys

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

gr = pytest.importorskip("gradio", reason='the page needs: pip install -e ".[web]"')

from animatediff.config.spellings import as_values, build_request  # noqa: E402
from animatediff.media.video import read_metadata, save_video  # noqa: E402
from animatediff.page import serve as serving  # noqa: E402
from animatediff.page import views  # noqa: E402
from animatediff.page.app import Page  # noqa: E402
from animatediff.page.fields import MORE, PROMPT, SECTIONS, form_fields  # noqa: E402
from animatediff.page.jobs import DONE, FAILED, RUNNING, WAITING, Job, JobQueue, Journal  # noqa: E402
from animatediff.page.places import Places  # noqa: E402
from animatediff.page.presets import read_settings  # noqa: E402
from animatediff.utils import UserError  # noqa: E402
from scripts.app import main  # noqa: E402
from tests.page.test_jobs import until  # noqa: E402


def draw(job: Job, places: Places) -> str:
    """In place of sampling: a clip that remembers the job's settings."""
    job.step(1, 1)
    clip = places.output / f"page-{job.id}" / "sample" / "0-a-clip.gif"
    save_video(np.zeros((2, 8, 8, 3), np.uint8), clip, metadata={**job.settings, "prompt": job.title})
    return str(clip)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    (folder / "models/Motion_Module").mkdir(parents=True)
    (folder / "models/Motion_Module/x.safetensors").write_bytes(b"not at all")
    places = Places(folder / "models", folder / "samples")
    page = Page(places, JobQueue(lambda job: draw(job, places), Journal(places.output / "page.jsonl")))
    page.build()
    return page


def ask(page: Page, session: dict, **changes) -> tuple[dict, dict]:
    """Submit the form as it is at first, with changes; (session, sentences by field)."""
    filled = page.form.start | {name.replace("__", "."): value for name, value in changes.items()}
    updates = page.submit(session, *(filled.get(name) for name in page.form.inputs))
    names = {component: name for name, component in page.form.inputs.items()}
    told = {names[c]: u["info"] for c, u in updates.items() if c in names and u.get("elem_classes")}
    notes = {component: name for name, component in page.form.notes.items()}
    told |= {notes[c]: u for c, u in updates.items() if c in notes and "sentence" in u}
    return updates[page.session], told


def test_every_option_has_a_component_with_the_config_s_words(page):
    assert set(page.form.inputs) >= {name for section in SECTIONS for name in section.of} | {PROMPT, MORE}
    for name, field in form_fields().items():
        component = page.form.inputs[name]
        assert component.label == field.label
        assert name in page.form.notes or component.info == field.help
    sections = [block for block in page.form.sections.values()]
    assert all(not section.open for section in sections), "folded"


def test_clips_of_two_people(page):
    sessions = [{"tab": f"person {n}"} for n in range(2)]
    for n in range(6):
        session, told = ask(page, sessions[n % 2], prompts__prompt=f"clip {n}")
        assert not told
    jobs = [job for session in sessions for job in page.queue.of(session["tab"])]
    until(lambda: all(job.ended for job in jobs), 30)
    assert {job.state for job in jobs} == {DONE}
    assert len({read_metadata(job.result)["prompt"] for job in jobs}) == 6
    assert [len(page.queue.of(session["tab"])) for session in sessions] == [3, 3]
    updates = page.look(sessions[0], {})
    assert f"page-{page.queue.of('person 0')[-1].id}" in updates[page.stage], "the own last clip"
    assert len(updates[page.gallery]) == 6
    assert set(page.look(sessions[0], updates[page.seen])) == {page.seen}, "nothing is sent again that has not changed"


def test_mistakes_stand_beside_their_fields_until_they_are_corrected(page):
    session, told = ask(page, {"tab": "a"}, size__height="100", model__motion_module="/etc/passwd", size__num_frames=40)
    assert told == {"size.height": "Got 100, expected a multiple of 8: use 96"}
    assert session["wrong"] == ["size.height"]
    session, told = ask(page, session, model__motion_module="/etc/passwd")
    assert "expected a file in" in told.pop("model.motion_module") and not told
    session, told = ask(page, session, model__motion_module=str(page.places.models / "Motion_Module/x.safetensors"))
    assert list(told) == ["model.motion_module"]
    session, told = ask(page, session, size__num_frames=40)
    assert told["size.num_frames"].startswith("Got 40 frames, expected at most 32")
    session, told = ask(page, session, model__motion_module="animatediff/assets/shapes_neon_lora.safetensors")
    assert "this is a LoRA of an image model, not a motion module" in told["model.motion_module"]
    rgb = "animatediff/assets/shapes_sparsectrl_rgb.safetensors"
    session, told = ask(page, session, sparsectrl__path=rgb)
    assert "without controlnet_images" in told["sparsectrl.path"]
    session, told = ask(page, session, inputs__image=str(page.places.models / "Motion_Module/x.safetensors"))
    assert "expected a picture or clip" in told["inputs.image"]
    short = page.places.output.parent / "mine.gif"
    save_video(np.zeros((2, 8, 8, 3), np.uint8), short)
    session, told = ask(page, session, finish__audio=str(short), output__format="mp4")
    assert "mine.gif" in told["finish.audio"] and "samples" not in told["finish.audio"]
    assert not page.queue.of("a")


def test_size_and_guidance_are_those_of_the_image_model(page):
    bundled = page.form.start["model.base"]
    of_it = [page.form.inputs[name].value for name in ("size.width", "size.height", "sampling.guidance_scale")]
    assert of_it == ["64", "64", "3"]
    assert page.other_base("models/StableDiffusion/x", *of_it) == ["", "", ""]
    assert page.other_base(bundled, "", "", "") == of_it
    kept = page.other_base("models/StableDiffusion/x", "512", "64", "7")
    assert kept[1] == "" and [set(update) for update in (kept[0], kept[2])] == [{"__type__"}] * 2, (
        "what one has typed stays"
    )


def test_a_drawn_seed_is_part_of_the_job(page):
    ask(page, {"tab": "seeds"}, sampling__seed="-1")
    (job,) = page.queue.of("seeds")
    (seed,) = job.settings["sampling"]["random_seed"]
    assert build_request(job.settings, where="").per_prompt()[0][2] == seed >= 0


def test_settings_of_a_clip_fill_the_form(page, tmp_path):
    values = {
        "prompt": "a <b>",
        "model.base": "animatediff/assets/shapes.safetensors",
        "video": "/etc/passwd",
        "steps": 7,
    }
    values |= {"model.motion_module": "gone.safetensors", "format": "webp"}
    clip = tmp_path / "clip.gif"
    settings = as_values(build_request(values, where=""), changed_only=True)
    save_video(np.zeros((2, 8, 8, 3), np.uint8), clip, metadata=settings)
    updates = page.dropped({"tab": "b"}, str(clip))
    value = {name: updates[component].get("value") for name, component in page.form.inputs.items()}
    assert (value[PROMPT], value["sampling.steps"], value["output.format"]) == ("a <b>", "7", "webp")
    assert not value["model.motion_module"] and value["inputs.video"] is None
    assert "gone.safetensors" in updates[page.message] and "/etc/passwd" in updates[page.message]
    save_video(np.zeros((2, 8, 8, 3), np.uint8), clip)
    with pytest.raises(UserError, match="got mine.gif, which holds no settings"):
        read_settings(clip, page.places, "mine.gif")


def test_settings_of_automatic1111_fill_the_form(page, tmp_path):
    text = "a red circle\nNegative prompt: blur\nSteps: 12, Sampler: Euler a, CFG scale: 6.5, Seed: 77, Size: 128x64"
    picture = tmp_path / "theirs.png"
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", text)
    Image.new("RGB", (8, 8)).save(picture, pnginfo=info)
    updates = page.dropped({"tab": "c"}, str(picture))
    value = {name: updates[component].get("value") for name, component in page.form.inputs.items()}
    assert (value[PROMPT], value["sampling.steps"], value["sampling.seed"]) == ("a red circle", "12", "77")
    assert (value["size.width"], value["sampling.sampler"]) == ("128", "euler_ancestral")
    assert "theirs.png: needs the image model" in updates[page.message]


def test_nobody_s_text_becomes_html():
    evil = "<img src=x onerror='alert(1)'>\"'"
    for state, message in ((WAITING, ""), (RUNNING, evil), (FAILED, evil), (DONE, "")):
        job = Job("me", evil, {}, state=state, message=message, result=f"/x/{evil}.gif", preview=b"x")
        html = views.stage(job, 1, "") + views.job_list([job, job], {}) + views.sentence_html(evil)
        assert "<img src=x" not in html and not re.search(r"onerror=['\"]", html)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--host", "0.0.0.0"], "got --host 0.0.0.0, which others can reach, without --password"),
        (["--host", "my-machine"], "without --password"),
        (["--port", "0"], "got --port 0, expected 1 to 65535"),
        (["--max-upload-mb", "0"], "expected more than 0"),
        (["--output-dir", "/proc/none"], "cannot make the folder /proc/none/inputs"),
        (["--share"], "unrecognized arguments: --share"),
        (["--device", "abacus"], "abacus"),
    ],
)
def test_options_of_the_script(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=re.escape(message)):
        main(arguments)


def test_without_gradio_it_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(UserError, match=re.escape('pip install -e ".[web]"')):
        serving.serve(serving.ServerOptions(output_dir=str(tmp_path)), wait=False)


def test_a_port_in_use_is_named():
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(UserError, match=f"got --port {port}, expected a free one .*: choose another"):
            serving.ServerOptions(port=port).check()
    serving.ServerOptions(port=port).check()
