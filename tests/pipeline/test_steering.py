"""What steers an animation, through the pipeline: what is off changes nothing, what is on does what it says."""

import itertools

import pytest
import torch
from PIL import Image

from animatediff.config.prompt_yaml import RunConfig, dump_config, load_config
from animatediff.config.request import FreeInit, FreeU, Windows
from animatediff.config.spellings import parse_assignments
from animatediff.features.feature import Run
from animatediff.features.noise import seeded
from animatediff.features.registry import FEATURES
from animatediff.media.video import read_metadata
from animatediff.pipeline.assemble import Assembler
from animatediff.pipeline.headers import check_requests
from animatediff.pipeline.pipeline import AnimateDiffPipeline
from animatediff.pipeline.run import animate
from animatediff.utils import UserError
from tests.nano import entry, write_config

FOX = "a red fox"
CALL = {"num_frames": 4, "height": 32, "width": 32, "num_inference_steps": 2, "output_type": "latent"}


@pytest.fixture
def run(pipeline):
    """Latents (b, c, f, h, w) of a small call."""

    def run(prompt=FOX, *, seed=3, **arguments):
        return pipeline(prompt, **{"generator": seeded(seed)} | CALL | arguments).frames

    return run


def test_freeinit(run):
    steps = []

    def count(pipe, step, timestep, tensors):
        steps.append((step, timestep))

    clip = run(freeinit=FreeInit(iterations=2, fast=True), callback_on_step_end=count)
    assert steps == [(0, 1), (1, 501), (2, 1)], "one step, then two"
    assert torch.equal(run(freeinit=FreeInit(iterations=1)), run())
    assert not torch.allclose(clip, run(), atol=1e-3) and clip.isfinite().all()
    generators = [seeded(9), seeded(3)]
    both = run([FOX, FOX], generator=generators, freeinit=FreeInit(iterations=2, fast=True), height=64, width=64)
    alone = run(freeinit=FreeInit(iterations=2, fast=True), height=64, width=64)
    assert torch.allclose(both[1:], alone, atol=1e-3), "each clip's fresh noise comes from its own generator"
    with pytest.raises(UserError, match="freeinit.fast: got timesteps of your own"):
        run(freeinit=FreeInit(fast=True), num_inference_steps=None, timesteps=[900, 1])


@pytest.mark.slow
def test_noise_type(run):
    """It goes by the windows, and all draws of a run are arranged alike."""
    call = {"windows": Windows(length=3, overlap=1), "num_frames": 6}
    assert torch.equal(run(noise_type="random", **call), run(**call))
    clips = [run(noise_type=kind, **call) for kind in ("random", "shuffle", "repeat", "constant")]
    for a, b in itertools.combinations(clips, 2):
        assert not torch.allclose(a, b, atol=1e-3)
    with pytest.raises(UserError, match="noise_type: got 'shufle', expected random or shuffle or repeat or constant"):
        run(noise_type="shufle")


def test_what_is_off_gives_back_the_denoiser(pipeline):
    def denoise(x, t, frames):
        raise AssertionError("not called")

    run = Run(pipeline.model, pipeline.request, None, torch.tensor([1]), lambda frames: None)
    for feature in FEATURES:
        with feature(denoise, run) as same:
            assert same is denoise


def test_motion_scale_0_with_one_noise_stands_still(run):
    """Each frame is then the image model's, of the same noise; also with a sampler that adds noise, and in windows."""
    for more in ({}, {"eta": 1.0}, {"windows": Windows(length=3, overlap=1)}):
        still = run(motion_scale=0, noise_type="constant", **more)
        assert torch.allclose(still, still[:, :, :1].expand_as(still), atol=1e-4)
        moving = run(noise_type="constant", **more)
        assert not torch.allclose(moving, moving[:, :, :1].expand_as(moving), atol=1e-2)
    apart = run(motion_scale=0)
    assert not torch.allclose(apart, apart[:, :, :1].expand_as(apart), atol=1e-2), "each frame from its own noise"


def test_motion_scale_follows_the_frames_into_windows(run):
    """A frame whose scale is 0 is the image model's, wherever its windows have it."""
    image = run(motion_scale=0, num_frames=6)
    scales = {0: 0, 2: 0, 3: 1, 5: 1}
    for more in ({}, {"windows": Windows(length=3, overlap=1)}, {"loop": "rotate"}):
        clip = run(motion_scale=scales, num_frames=6, **more)
        assert torch.allclose(clip[:, :, :3], image[:, :, :3], atol=2e-3)
        assert not torch.allclose(clip[:, :, 3:], image[:, :, 3:], atol=1e-2)
    assert torch.equal(run(motion_scale=[1, 0.5, 0.5, 0]), run(motion_scale={0: 1, 1: 0.5, 2: 0.5, 3: 0}))


def test_over_steps(run):
    """A schedule of the first step alone: with one step it is that number."""
    assert torch.equal(
        run(motion_scale={"0%": 0.5, "100%": 1}, num_inference_steps=1), run(motion_scale=0.5, num_inference_steps=1)
    )
    assert torch.equal(run(guidance_schedule={"0%": 1, "50%": 1}), run(guidance_schedule=1.0))
    assert torch.allclose(run(guidance_schedule=0.5, guidance_scale=8.0), run(guidance_scale=4.0), atol=1e-4)
    falling = run(guidance_schedule={"0%": 1, "100%": 0.25}, guidance_scale=8.0)
    assert not torch.allclose(falling, run(guidance_scale=8.0), atol=1e-3)


PAG = {"pag_scale": 3.0, "pag_layers": ["up_blocks"]}


@pytest.mark.parametrize(
    "more, rows",
    [
        ({}, [2, 1]),
        ({"split_guidance": True}, [1, 1, 1]),
        (PAG, [3, 2]),
        (PAG | {"split_guidance": True}, [1, 1, 1, 1, 1]),
        ({"loop": "rotate"}, [2, 1]),
        ({"freeinit": FreeInit(2, fast=True)}, [2, 2, 1]),
    ],
)
def test_steps_with_a_scale_of_1_have_no_unconditional_part(run, pipeline, monkeypatch, more, rows):
    """They are those of the whole batch, but for rounding."""
    seen: list[int] = []
    forward = pipeline.unet.forward
    monkeypatch.setattr(pipeline.unet, "forward", lambda x, *a, **k: seen.append(len(x)) or forward(x, *a, **k))
    call = {"guidance_scale": 3.0, "guidance_schedule": {"0%": 1, "50%": 0.3333}} | more
    clip = run(**call)
    assert seen == rows
    monkeypatch.setattr("animatediff.pipeline.sample.UNGUIDED", -1)
    assert torch.allclose(run(**call), clip, atol=5e-3)


def test_pe_stretch(run):
    assert run(num_frames=40, pe_stretch=1.5, num_inference_steps=1).shape[2] == 40
    assert not torch.allclose(run(pe_stretch=2.0), run(), atol=1e-3)
    with pytest.raises(UserError, match="num_frames: got 49 frames, expected at most 48"):
        run(num_frames=49, pe_stretch=1.5)
    with pytest.raises(UserError, match="num_frames: got 40 frames, expected at most 32"):
        run(num_frames=40)


def test_guidance(run):
    plain = run()
    pag = {"pag_scale": 3.0, "pag_layers": ["up_blocks"]}  # the middle of so small a picture is a single token
    for more in (pag, pag | {"guidance_scale": 1.0}, {"guidance_rescale": 0.7}):
        assert not torch.allclose(run(**more), plain, atol=1e-3)
    assert not torch.allclose(run(freeu=FreeU()), plain, atol=1e-3)
    assert torch.allclose(run(freeu=FreeU(1, 1, 1, 1)), plain, atol=1e-2)
    everything = run(
        motion_scale=0.8, guidance_schedule={"0%": 1, "100%": 0.5}, pag_scale=1.0, pag_layers=["up_blocks"],
        guidance_rescale=0.5, freeu=FreeU(), pe_stretch=1.5, noise_type="shuffle", freeinit=FreeInit(2, fast=True),
        windows=Windows(length=3, overlap=1), sampler="dpmpp_2m",
    )  # fmt: skip
    assert everything.shape == plain.shape and everything.isfinite().all()
    assert torch.equal(run(), plain), "nothing is left behind"


def test_loops(run):
    clip = run(num_frames=5)
    there_and_back = run(num_frames=5, loop="pingpong")
    assert torch.equal(there_and_back, clip[:, :, [0, 1, 2, 3, 4, 3, 2, 1]])
    assert torch.equal(run(num_frames=1, loop="pingpong"), run(num_frames=1))
    assert not torch.allclose(run(num_frames=5, loop="rotate"), clip, atol=1e-3)


@pytest.mark.slow
def test_lora_schedules(nano, make_entry):
    """With one step, a schedule that is a number there is that scale; afterwards all is as before."""
    loras = {
        "lora_model_path": str(nano / "kohya.safetensors"),
        "motion_module": str(nano / "mm_v2.safetensors"),
        "motion_module_lora_configs": [{"path": str(nano / "motion_lora.safetensors"), "alpha": 0.8}],
    }
    assembler = Assembler(torch.device("cpu"), torch.float32)
    components = assembler.assemble(check_requests([make_entry(**loras)])[0])
    assert sorted(components.lora_roles.values()) == ["loras", "motion_loras"]
    pipe = AnimateDiffPipeline(components)

    def run(**arguments):
        return pipe(FOX, **CALL | {"num_inference_steps": 1}, generator=seeded(3), **arguments).frames

    plain, off = run(), run(motion_lora_schedule={"0%": 0, "100%": 1})
    name = next(name for name, role in components.lora_roles.items() if role == "motion_loras")
    assert torch.equal(run(), plain) and components.loras.merged and components.loras.scale(name) == 0.8
    components.loras.set_scale(name, 0.0)
    assert torch.allclose(run(), off, atol=1e-3) and not torch.allclose(off, plain, atol=1e-2)
    assert not torch.allclose(run(lora_schedule={"0%": 0}), run(), atol=1e-3)


def test_config(nano, make_entry, tmp_path):
    """Options of an entry: read, dumped and read again; the pipeline takes them as defaults."""
    given = {
        "freeinit": {"iterations": 2, "filter": "gaussian"},
        "motion_scale": {0: 1, 1: 0.5},
        "guidance_schedule": {"0%": 1, "100%": 0.5},
        "freeu": {"b1": 1.2},
        "loop": "pingpong",
        "name": "1",
    }
    entry = make_entry(**given)
    assert entry.freeinit == FreeInit(2, "gaussian") and entry.motion.scale == {0: 1, 1: 0.5}
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(RunConfig("a", (entry,))), encoding="utf-8")
    assert load_config(path).entries == (entry,)
    pipe = AnimateDiffPipeline.from_config(path, device="cpu")
    assert (pipe.request.freeinit, pipe.request.freeu, pipe.request.loop) == (entry.freeinit, entry.freeu, entry.loop)
    assert (pipe.request.motion, pipe.request.guidance) == (entry.motion, entry.guidance)
    assert make_entry(motion_scale=[1, 0.5]).motion.scale == [1, 0.5]
    assert parse_assignments(["motion_scale={0: 1, 50%: 0}"]) == {"motion_scale": {0: 1, "50%": 0}}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"freeinit": {"iterations": 0}}, "freeinit.iterations: got 0"),
        ({"freeinit": {"filter": "sharp"}}, "freeinit.filter: got 'sharp', expected butterworth or gaussian"),
        ({"motion_scale": {0: 1, 2: 0}}, "motion_scale: got a keyframe at frame 2, expected 0 to 1"),
        ({"motion_scale": [1, 1, 1]}, "motion_scale: got 3 numbers for 2 frames"),
        ({"motion_scale": {0: "much"}}, "motion_scale: got 'much', expected a number"),
        (
            {"motion_scale": 0.5, "motion_module": ""},
            "motion_scale needs a motion_module: set motion_module, or remove motion_scale",
        ),
        ({"guidance_schedule": -1}, "guidance_schedule: got -1, expected 0 or more"),
        ({"guidance_schedule": 0.5, "guidance_scale": 1}, "guidance_schedule needs a guidance_scale above 1, got 1"),
        (
            {"guidance_rescale": 0.5, "guidance_scale": 1},
            "guidance_rescale needs a guidance_scale above 1 or a pag_scale",
        ),
        ({"guidance_rescale": 2}, "guidance_rescale: got 2, expected at most 1"),
        ({"pag_layers": ["up_blocks"]}, "pag_layers needs a pag_scale above 0"),
        ({"pe_stretch": 0}, "pe_stretch: got 0, expected more than 0"),
        ({"loop": "rotate", "window_schedule": "open"}, "loop: got rotate with windows"),
        ({"loop": "forever"}, "loop: got 'forever'"),
        ({"lora_schedule": {"0%": 1}}, "lora_schedule needs LoRAs to schedule: set lora_model_path"),
        ({"motion_mask": "nowhere.png"}, "motion_mask: there is no nowhere.png"),
        ({"L": 65, "pe_stretch": 2}, "L: got 65 frames, expected at most 64"),
    ],
)
def test_mistakes_are_named(make_entry, values, message):
    with pytest.raises(UserError, match=message):
        check_requests([make_entry(**values)])


def test_motion_mask(run, tmp_path):
    """Black everywhere is motion scale 0; of another size than the clip it is refused."""
    black = str(tmp_path / "black.png")
    Image.new("L", (32, 32)).save(black)
    assert torch.equal(run(motion_mask=black), run(motion_scale=0))
    with pytest.raises(UserError, match="black.png of 32x32 pixels, expected 24x32"):
        run(motion_mask=black, width=24)


def test_files_record_it(nano, tmp_path):
    """A run's clip is as long as the loop makes it, and its file says what was done."""
    given = {"freeinit": {"iterations": 2}, "loop": "pingpong", "motion_scale": {0: 1, "2": 0.5}}
    path = write_config(tmp_path / "steered.yaml", entry(nano, L=3, **given))
    folder = animate(load_config(path), output_dir=tmp_path / "out", device="cpu")
    settings = read_metadata(next((folder / "sample").iterdir()))
    assert settings["frames"] == 4 and settings["size"]["num_frames"] == 3
    assert settings["freeinit"]["iterations"] == 2 and settings["loop"] == {"mode": "pingpong"}
    assert settings["motion"] == {"scale": {"0": 1, "2": 0.5}} and "pag" not in settings
    assert load_config(folder / "config.yaml").entries[0].freeinit == FreeInit(2)
