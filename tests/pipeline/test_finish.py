"""Finished clips: by a run, by scripts/finish.py and by a call, all the same; their settings, loops and refusals."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from animatediff.config.prompt_yaml import load_config
from animatediff.config.request import Request
from animatediff.config.spellings import build_request
from animatediff.media.sound import Sound, check_sound
from animatediff.media.video import read_metadata, read_video, save_video
from animatediff.pipeline.finish import Finisher, enlarged_size, second_pass, second_size, sound_of
from animatediff.pipeline.headers import check_requests
from animatediff.pipeline.run import animate
from animatediff.utils import UserError
from scripts import animate as animate_script
from scripts import finish as finish_script
from tests.media.interpolation import texture_clip
from tests.media.videos import encode, numbered
from tests.nano import entry, write_config

FINISH = {"scale": 2, "strength": 0.6, "interpolate": 2}
OPTIONS = ["finish.scale=2", "finish.strength=0.6", "finish.interpolate=2"]


def run(nano: Path, folder: Path, name: str = "out", **values: object) -> Path:
    """The only clip of a run, a folder of PNGs if nothing else is asked for."""
    config = load_config(write_config(folder / f"{name}.yaml", entry(nano, **{"format": "png", "L": 3, **values})))
    animate(config, output_dir=folder / name, device="cpu")
    (clip,) = (folder / name / "sample").iterdir()
    return clip


@pytest.fixture(scope="module")
def first(nano, tmp_path_factory) -> Path:
    """A clip that is not finished."""
    return run(nano, tmp_path_factory.mktemp("first"))


def finished(*arguments: str | Path) -> Path:
    finish_script.main([*map(str, arguments), "--device", "cpu"])
    return Path(arguments[0])


@pytest.mark.slow
def test_run_script_and_repetition_are_the_same(nano, first, tmp_path, capsys):
    """A run with `finish`, scripts/finish.py on the clip without, and the run's clip as a config of its own."""
    by_run = run(nano, tmp_path, finish=FINISH)
    frames, fps = read_video(by_run)
    assert frames.shape == (5, 32, 32, 3)
    assert fps == 16
    assert "finished: 3 frames of 16x16 -> 5 frames of 32x32; seam " in capsys.readouterr().err
    finished(first, *OPTIONS, "--output", tmp_path / "by-script")
    assert torch.equal(read_video(tmp_path / "by-script")[0], frames)
    out = capsys.readouterr()
    assert out.out.split() == [str(tmp_path / "by-script")]
    assert "flicker" in out.err and "colours" in out.err
    settings = [read_metadata(clip) for clip in (by_run, tmp_path / "by-script")]
    assert settings[0] == settings[1]
    assert settings[0]["finish"] == FINISH
    animate_script.main(
        ["--config", str(by_run / "0000.png"), "--output-dir", str(tmp_path / "again"), "--device", "cpu"]
    )
    (again,) = (tmp_path / "again/sample").iterdir()
    assert torch.equal(read_video(again)[0], frames)


def test_every_step_is_counted(nano, tmp_path):
    counts = []
    for finish in ({}, FINISH, FINISH | {"steps": 10}):
        config = load_config(write_config(tmp_path / "c.yaml", entry(nano, steps=5, finish=finish)))
        counts.append(check_requests(config.entries)[0].steps)
    assert counts == [5, 5 + 3, 5 + 6]


def test_what_is_at_its_defaults_changes_nothing():
    video = torch.randint(0, 256, (1, 3, 3, 16, 16), dtype=torch.uint8)
    assert torch.equal(Finisher(Request().finish)(video, Request()), video)
    assert not Request().finish.changes


def test_tiles_of_the_second_pass(pipeline):
    """Tiles as large as the picture are no tiles; smaller ones make another clip of the same size."""
    video, made = texture_clip("pan", 0, frames=2, size=16)[None], {}
    for tile in (0, 32, 24):
        asked = {"prompt": "a fox", "num_frames": 2, "height": 16, "width": 16, "num_inference_steps": 2, "seed": 1}
        request = pipeline.request_for({**asked, "finish": {"scale": 2, "strength": 0.6, "tile": tile}})
        made[tile] = pipeline.finish(video, request)
        assert made[tile].shape == (1, 2, 3, 32, 32)
    assert torch.equal(made[0], made[32])
    assert not torch.equal(made[0], made[24])


def test_latents_are_enlarged(pipeline):
    """Latents that keep their size are those of the pixels."""
    video = texture_clip("pan", 0, frames=2, size=16)[None]
    asked = {"prompt": "a fox", "num_frames": 2, "height": 16, "width": 16, "num_inference_steps": 2, "seed": 1}

    def made(**finish):
        return pipeline.finish(video, pipeline.request_for({**asked, "finish": {"strength": 0.6, **finish}}))

    assert torch.equal(made(enlarge="latents"), made())
    larger = made(enlarge="latents", scale=2)
    assert larger.shape == (1, 2, 3, 32, 32)
    assert not torch.equal(larger, made(scale=2))


def sample_darker(request: Request, features: tuple, small: torch.Tensor | None) -> torch.Tensor:
    """A second pass that loses half of the light."""
    return request.inputs.video // 2


@pytest.mark.parametrize("kept", [True, False])
def test_colours_are_the_first_pass_s(kept):
    video = texture_clip("pan", 0, frames=2, size=16)[None]
    options = replace(Request().finish, strength=0.5, match_colors=kept)
    request = replace(Request(), size=replace(Request().size, num_frames=2, height=16, width=16), finish=options)
    after = Finisher(options)(video, request, sample_darker)
    shift = (after.float().mean((0, 1, 3, 4)) - video.float().mean((0, 1, 3, 4))).abs().max()
    assert shift < 1 if kept else shift > 40


@pytest.mark.parametrize(
    ("values", "frames"),
    [({}, 5), ({"windows": {"schedule": "closed"}}, 6), ({"loop": {"mode": "rotate"}}, 6),
     ({"loop": {"mode": "pingpong"}}, 6), ({"finish": {"loop": True}}, 6),
     ({"windows": {"schedule": "closed"}, "finish": {"loop": False}}, 5)],
)  # fmt: skip
def test_loops_stay_loops(values, frames):
    finish = {"interpolate": 2, **values.get("finish", {})}
    request = build_request({"prompt": "a fox", **values, "finish": finish}, where="")
    video = texture_clip("pan", 0, frames=3, size=16)[None]
    made = Finisher(request.finish)(video, request)
    assert made.shape == (1, frames, 3, 16, 16)
    assert torch.equal(made[:, ::2], video)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("values", "frames"), [({"loop": "pingpong", "L": 4}, 12), ({"windows": "closed", "L": 5}, 10)]
)
def test_loops_go_through_the_second_pass(nano, tmp_path, values, frames):
    video, _ = read_video(run(nano, tmp_path, finish=FINISH, **values))
    assert video.shape == (frames, 32, 32, 3)
    if "loop" in values:  # the way back is the way there
        own = video[::2].int()
        assert (own[1:3] - own[4:].flip(0)).abs().max() <= 2


@pytest.mark.slow
def test_mask_and_extension(nano, tmp_path):
    """What a mask kept of a video stays in the second pass; a clip that was extended goes through windows."""
    video = texture_clip("pan", 0, frames=3, size=16)
    save_video(video, tmp_path / "video")
    mask = np.zeros((16, 16), np.uint8)
    mask[:, 8:] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    given = {"video": str(tmp_path / "video")}
    clip = run(nano, tmp_path, "masked", **given, mask=str(tmp_path / "mask.png"), finish=FINISH)
    assert read_video(clip)[0].shape == (5, 32, 32, 3)
    clip = run(nano, tmp_path, "longer", **given, extend=2, L=18, finish=FINISH | {"interpolate": 1})
    assert read_video(clip)[0].shape == (18, 32, 32, 3)


def test_sizes_that_requests_have():
    """Of a VAE whose latent pixels are smaller than 8, too; of an MP4 without a second pass they are even."""
    video = torch.zeros(1, 2, 3, 64, 40, dtype=torch.uint8)
    for values, size in (
        ({"strength": 0.5}, (80, 48)),
        ({"format": "mp4"}, (84, 52)),
        ({"format": "png"}, (83, 52)),
    ):
        finish = {"scale": 1.3, "strength": values.pop("strength", 0)}
        asked = {"prompt": "a fox", "num_frames": 2, "height": 64, "width": 40, **values, "finish": finish}
        request = build_request(asked, where="")
        after = Finisher(request.finish, downsampling=4)(video, request, sample_darker)
        assert after.shape[-2:] == size
    second = second_pass(replace(request, finish=replace(request.finish, strength=0.5)))
    assert (second.size.height, second.size.width) == second_size((64, 40), 1.3, 4) == (80, 48)


def test_in_a_call(pipeline):
    plain = dict(num_frames=3, height=16, width=16, num_inference_steps=2, seed=1, output_type="pt", return_dict=False)
    (before,), (after,) = (pipeline("a fox", **plain, **more) for more in ({}, {"finish": FINISH}))
    assert before.shape == (1, 3, 3, 16, 16)
    assert after.shape == (1, 5, 3, 32, 32)
    with pytest.raises(UserError, match="finish for the output type latent"):
        pipeline("a fox", **plain | {"output_type": "latent"}, finish=FINISH)


def test_no_clip_depends_on_its_batch_mates(pipeline):
    video = torch.stack([texture_clip("pan", seed, frames=2, size=16) for seed in range(2)])
    asked = {"num_frames": 2, "height": 16, "width": 16, "num_inference_steps": 2}
    asked["finish"] = {"scale": 2, "strength": 0.6, "match_colors": False}
    one, two = (pipeline.request_for({**asked, "prompt": p, "seed": s}) for p, s in
                (("a fox", 1), (["a fox", "a cat"], [1, 2])))  # fmt: skip
    alone, together = pipeline.finish(video[:1], one), pipeline.finish(video, two)
    assert (alone.int() - together[:1].int()).abs().max() <= 1
    assert (alone.int() - together[1:].int()).abs().float().mean() > 10


def test_a_clip_without_settings(tmp_path, capsys, monkeypatch):
    """Lanczos and interpolation; beside the clip, and never over what is there."""
    monkeypatch.chdir(tmp_path)
    save_video(texture_clip("pan", 0, frames=3, size=16), "clip.mp4", 10)
    finished("clip.mp4", "finish.scale=1.5", "finish.interpolate=2", "output.format=webp")
    assert capsys.readouterr().out.split() == ["clip-finished.webp"]
    frames, fps = read_video("clip-finished.webp")
    assert frames.shape == (5, 24, 24, 3)
    assert fps == 20
    assert read_metadata("clip-finished.webp")["finished_from"]["path"] == "clip.mp4"
    with pytest.raises(UserError, match="clip-finished.webp to write to, which is there already"):
        finished("clip.mp4", "finish.scale=2", "output.format=webp")
    with pytest.raises(UserError, match="finish.strength: got clip.mp4, which holds no settings of ours"):
        finished("clip.mp4", "finish.scale=2", "finish.strength=0.4")
    with pytest.raises(UserError, match="clip-finished.webp, which is finished already"):
        finished("clip-finished.webp", "finish.scale=2")


def test_sound_goes_along(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    encode(tmp_path / "tone.mp4", range(10), fps=10, sound=1)
    finished("tone.mp4", "finish.interpolate=2", "--audio")
    assert len(read_video("tone-finished.mp4")[0]) == 19
    check_sound(tmp_path / "tone-finished.mp4")
    started = {"prompt": "a fox", "video": "tone.mp4", "video_start": 3, "format": "mp4"}
    request = build_request({**started, "finish": {"audio": "tone.mp4"}}, where="")
    assert sound_of(request) == Sound(Path("tone.mp4"), pytest.approx(0.3))
    save_video(numbered(3), "mute.mp4", 10)
    with pytest.raises(UserError, match="mute.mp4, which has no sound"):
        finished("mute.mp4", "--audio")
    with pytest.raises(UserError, match=r"finish.audio: got gif, which holds no sound, expected mp4"):
        finished("tone.mp4", "--audio", "output.format=gif")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["finish.tile=64"], "finish.tile is of the second pass, which needs a finish.strength"),
        (["finish.strength=0.3"], "finish.strength: got 0.3 of 2 steps, which is none"),
        (["finish.enlarge=latents"], "finish.enlarge is of the second pass, which needs a finish.strength"),
        (
            ["finish.strength=0.6", "finish.scale=2", "finish.enlarge=latents", "finish.upscaler=a.pth"],
            "got finish.enlarge=latents and finish.upscaler, which is of pixels",
        ),
        (["finish.strength=0.3", "finish.upscaler=a.pth"], "finish.strength needs a finish.scale beside"),
        (["finish.loop=true"], "finish.loop needs a finish.interpolate of 2, 4 or 8"),
        (["finish.interpolate=3"], "finish.interpolate: got 3, expected 1 or 2 or 4 or 8"),
        (["finish.interpolate=8", "output.format=gif"], "fps times finish.interpolate: got 64 for gif"),
        (["finish.upscaler=none.pth"], "finish.upscaler: there is no none.pth"),
        (["finish.interpolate=2", "finish.interpolator=none.pt"], "finish.interpolator: there is no none.pt"),
        (["finish.scale=9"], "finish.scale: got 9, expected at most 8"),
        (["steps=3"], "got steps, expected options of finish"),
        (["finish.scalee=2"], "scale"),
        (["scale=2"], "unknown key 'scale', expected finish.scale"),
        ([], "got nothing to do, expected finish.scale=2"),
    ],
)
def test_refusals(first, options, message):
    with pytest.raises(UserError, match=message):
        finished(first, *options)


def test_models_of_finishing_are_looked_at_before_the_run(nano, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "spandrel", None)
    torch.save({"x": torch.zeros(1)}, tmp_path / "x.pth")
    for option, message in (
        ("upscaler", "an upscaler model needs spandrel"),
        ("interpolator", "expected RIFE's weights"),
    ):
        finish = {"interpolate": 2, option: str(tmp_path / "x.pth")}
        config = load_config(write_config(tmp_path / "a.yaml", entry(nano, finish=finish)))
        with pytest.raises(UserError, match=f"finish.{option}: .*{message}"):
            check_requests(config.entries)


def test_options_that_do_not_go_with_a_second_pass(nano, tmp_path):
    Image.new("L", (16, 16), 255).save(tmp_path / "mask.png")
    with pytest.raises(UserError, match="motion_mask, which has the first pass's size"):
        load_config(
            write_config(tmp_path / "a.yaml", entry(nano, motion_mask=str(tmp_path / "mask.png"), finish=FINISH))
        )
    tiled = FINISH | {"tile": 24}
    with pytest.raises(UserError, match="got finish.tile and controlnet_path, which is of whole pictures"):
        load_config(write_config(tmp_path / "a.yaml", entry(nano, controlnet_path="x.ckpt", finish=tiled)))


def test_the_second_request(nano, tmp_path):
    """Same model, prompt and seed; the larger clip in place of what the first pass started from."""
    values = {"video": str(tmp_path / "video"), "freeinit": {"iterations": 2}, "finish": FINISH | {"steps": 7}}
    save_video(texture_clip("pan", 0, frames=3, size=16), tmp_path / "video")
    config = load_config(write_config(tmp_path / "a.yaml", entry(nano, L=3, **values)))
    request = check_requests(config.entries)[0].request
    video = torch.zeros(1, 3, 3, 32, 32, dtype=torch.uint8)
    again = second_pass(request, video)
    assert second_pass(replace(request, inputs=replace(request.inputs, extend=1)), video).windows is not None
    assert (again.size.height, again.size.width, again.sampling.steps) == (32, 32, 7)
    assert again.inputs.video is not None and again.inputs.strength == 0.6
    assert again.freeinit is None and not again.finish.changes
    assert replace(again, size=request.size, inputs=request.inputs, finish=request.finish, freeinit=request.freeinit,
                   sampling=request.sampling) == request  # fmt: skip
    with pytest.raises(UserError, match="got a clip of 2 frames, expected the 3"):
        second_pass(request, video[:, :2])


def test_sizes():
    assert enlarged_size((64, 48), 1.5, 8) == (96, 72)
    assert enlarged_size((64, 40), 1.3, 8) == (80, 48)
    assert enlarged_size((10, 7), 1.5, 1) == (15, 10)
