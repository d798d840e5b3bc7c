"""SparseCtrl in the pipeline: images in, the right frames to the right window, nothing computed twice."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from animatediff.checkpoints.known_files import REPOSITORY, find_file
from animatediff.checkpoints.load import load_base, load_motion_module
from animatediff.checkpoints.sparsectrl_files import load_sparsectrl
from animatediff.config.prompt_yaml import load_config
from animatediff.config.request import Request, Sampling, Windows
from animatediff.config.request import SparseCtrl as Options
from animatediff.config.spellings import files as files_of
from animatediff.features import sparsectrl as module
from animatediff.features.feature import Run
from animatediff.features.noise import seeded
from animatediff.features.prompt_travel import text_of_frames
from animatediff.features.sparsectrl import Control, condition_pixels
from animatediff.features.windows import windows_of_step
from animatediff.media.video import read_metadata
from animatediff.models.sparsectrl_encoder import build_sparsectrl
from animatediff.pipeline.headers import check_requests
from animatediff.pipeline.pipeline import AnimateDiffPipeline
from animatediff.pipeline.run import animate
from animatediff.pipeline.sample import guided_denoiser
from animatediff.utils import UserError
from tests.checkpoints.synthetic import sparsectrl_tensors, write
from tests.models.test_golden import GOLDEN, assert_close, golden
from tests.nano import entry, flat, write_config

CALL = {"num_frames": 4, "height": 64, "width": 64, "num_inference_steps": 1, "output_type": "latent"}
TEXT = GOLDEN["text.last_hidden_state"]
T = torch.tensor([481])


@pytest.fixture(scope="module")
def files(nano):
    """The golden model's folder, with both encoders and images in it."""
    for kind in ("rgb", "scribble"):
        write(nano / f"sparsectrl_{kind}.safetensors", sparsectrl_tensors(kind))
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(nano / "a.png")
    Image.fromarray(pixels[::-1]).save(nano / "b.png")
    return nano


@pytest.fixture(scope="module")
def controlled(files) -> AnimateDiffPipeline:
    path = str(files / "sparsectrl_scribble.safetensors")
    values = entry(files, controlnet_path=path, controlnet_images=[str(files / "a.png")])
    return AnimateDiffPipeline.from_config(write_config(files / "run.yaml", values), device="cpu")


@pytest.fixture
def encoder_calls(controlled):
    """(videos, frames) of every call of the encoder."""
    seen = []
    encoder = controlled.model.sparsectrl
    hook = encoder.register_forward_hook(lambda _, inputs, __: seen.append(tuple(inputs[0].shape[:2])))
    yield seen
    hook.remove()


def predict(unet, control, x, scale=1.0):
    """The guided prediction of a network with such a control, for one text."""
    parts = ("conditional",) if scale <= 1 else ("unconditional", "conditional")
    request = Request(sampling=Sampling(guidance_scale=scale), sparsectrl=Options(images=("given",)))
    text = text_of_frames([TEXT[:1].to(x.dtype)] * len(parts), like=unet.conv_in.weight)
    model = SimpleNamespace(unet=unet, loras=None, lora_roles={}, networks={})
    with guided_denoiser(Run(model, request, None, T, text, parts, cache={"sparsectrl": control})) as denoise:
        return denoise(x, T)


def control_of(pipe, pictures, frames=4):
    """The control of a call with pictures of the first frames."""
    given = {"conditioning_frames": pictures, "controlnet_frame_indices": list(range(len(pictures)))}
    call = {name: value for name, value in CALL.items() if name != "output_type"}
    request = pipe.request_for({"prompt": "fox", **call, **given, "num_frames": frames})
    return module.make_control(Run(pipe.model, request, None, T, lambda frames: None))


def pixels_of(pictures, size, **options):
    return condition_pixels(Options(images=tuple(pictures), **options), size)


def images(files) -> list[str]:
    return [str(files / "a.png"), str(files / "b.png")]


# --- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["rgb", "scribble"])
@torch.no_grad()
def test_official_prediction(files, kind):
    """Through the denoiser, given frames by number, at the golden scale of 0.8.

    In double precision: the golden encoder's own rounding, which moves its residuals by 2e-5, is all that is left.
    """
    base = load_base(files / "nano.safetensors")
    unet = load_motion_module(base.unet, files / "mm_v3.safetensors")[0].double()
    encoder = load_sparsectrl(files / f"sparsectrl_{kind}.safetensors", base.unet, base.vae)[0].double()
    given = golden(f"input.sparsectrl_{kind}")[0].double()
    control = Control(encoder, given, (0, 4), frames=5, scales=(0.8,))
    x, text = golden("input.latents")[:1].double(), TEXT[:1].double()
    assert_close(predict(unet, control, x), golden(f"sparsectrl.{kind}.unet_v3"), 2e-5)
    # Both halves of guidance get it: guided towards itself, the prediction stays.
    assert_close(predict(unet, control, x, 3.0), golden(f"sparsectrl.{kind}.unet_v3"), 2e-5)
    uneven = Control(encoder, given, (0, 4), frames=5, scales=(0.8, 0.0, 0.8, 2.0, 0.8))(T, text, torch.arange(5))
    even = control(T, text, torch.arange(5))
    for a, b in zip(uneven["down_residuals"], even["down_residuals"], strict=True):
        torch.testing.assert_close(a, b * torch.tensor([1, 0, 1, 2.5, 1])[:, None, None, None])


@torch.no_grad()
def test_rgb_latents_are_the_posteriors_mean(files):
    pipe_entry = entry(files, controlnet_path=str(files / "sparsectrl_rgb.safetensors"))
    pipe_entry["controlnet_images"] = [str(files / "a.png")]
    pipe = AnimateDiffPipeline.from_config(write_config(files / "x.yaml", pipe_entry), device="cpu")
    c, control = pipe.model, control_of(pipe, [files / "a.png"])
    pixels = pixels_of([files / "a.png"], (64, 64))
    latents = c.vae.encode(pixels * 2 - 1)[0] * c.vae.config.scaling_factor
    assert_close(control.embedded[:1], c.sparsectrl.embed(latents, torch.ones(1)))


# --- the pipeline ----------------------------------------------------------------------------------------------------


def test_images_steer_and_a_fresh_encoder_does_not(controlled, files):
    def run(**arguments):
        return controlled("fox", generator=seeded(1), **CALL | arguments).frames

    plain = run()
    steered = run(conditioning_frames=images(files), controlnet_frame_indices=[0, -1])
    assert not torch.allclose(steered, plain, atol=1e-2)
    pixels = pixels_of(images(files), (64, 64))
    assert torch.equal(run(conditioning_frames=pixels, controlnet_frame_indices=[0, 3]), steered)
    off = run(conditioning_frames=pixels[:1], controlnet_conditioning_scale=0.0)
    assert torch.equal(off, plain)
    c = controlled.model
    fresh = {"sparsectrl": build_sparsectrl(c.unet, "scribble")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(c, "networks", fresh)
        assert torch.equal(run(conditioning_frames=pixels[:1]), plain)


def test_nothing_is_computed_twice(controlled, files, encoder_calls):
    """Once a step for all clips of a prompt, and once for a timestep that the sampler comes back to."""
    one = {"conditioning_frames": images(files)[:1]}
    controlled("fox", num_videos_per_prompt=2, **CALL | {"num_inference_steps": 2}, **one)
    assert encoder_calls == [(2, 4)] * 2, "the prompt's and the negative prompt's, not those of every clip"
    encoder_calls.clear()
    controlled(["fox", "fox"], **CALL | {"guidance_scale": 1.0}, **one)
    assert encoder_calls == [(1, 4)]
    encoder_calls.clear()
    controlled("fox", **CALL | {"num_inference_steps": 3, "sampler": "pndm"}, **one)
    assert len(encoder_calls) == 3, "PNDM asks four times, twice at one timestep"
    encoder_calls.clear()
    controlled("fox", **CALL)
    assert encoder_calls == [], "no images, no encoder"


def test_clips_of_one_prompt_are_those_made_alone(controlled, files):
    one = {"conditioning_frames": images(files)[:1], **CALL, "guidance_scale": 2.0}
    both = controlled(["fox", "snow", "fox"], generator=[seeded(i) for i in range(3)], **one).frames
    for i, prompt in enumerate(("fox", "snow", "fox")):
        alone = controlled(prompt, generator=seeded(i), **one).frames
        torch.testing.assert_close(both[i : i + 1], alone, atol=1e-3, rtol=1e-3)


def test_windows_see_their_own_frames(controlled, files, encoder_calls):
    """A window is told of an image when the image's frame is in it, at its place there."""
    encoder, windows = controlled.model.sparsectrl, Windows("static", length=4, overlap=1)
    seen = []
    hook = encoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][0]))
    try:
        controlled(
            "fox",
            **CALL | {"num_frames": 7, "windows": windows},
            conditioning_frames=images(files),
            controlnet_frame_indices=[1, -1],
        )
    finally:
        hook.remove()
    assert windows_of_step(windows, 0, 7) == [(0, 1, 2, 3), (3, 4, 5, 6)] and len(encoder_calls) == 2
    (blank, a, *_), (*_, b) = seen
    for window, expected in zip(seen, ([blank, a, blank, blank], [blank, blank, blank, b]), strict=True):
        assert torch.equal(window, torch.stack(expected))
    assert not torch.equal(a, blank) and not torch.equal(b, blank) and not torch.equal(a, b)


def test_memory_is_bounded(controlled, files, encoder_calls, monkeypatch):
    """With no room but for the last, a timestep is known until the next one is asked for."""
    frames, other = torch.arange(4), torch.tensor([961])
    with torch.no_grad():
        roomy = control_of(controlled, images(files)[:1])
        for t in (T, other, T, other):
            first = roomy(t, TEXT[:1], frames)
        assert len(encoder_calls) == 2
        assert torch.equal(roomy(other, TEXT[:1], frames)["mid_residual"], first["mid_residual"])
        roomy(other, TEXT[1:], frames)
        assert len(encoder_calls) == 3, "another text is another result"
        monkeypatch.setattr(module, "CACHE_BYTES", 0)
        tight = control_of(controlled, images(files)[:1])
        for t in (T, T, other, T):
            tight(t, TEXT[:1], frames)
    assert len(encoder_calls) == 3 + 3


# --- images ----------------------------------------------------------------------------------------------------------


def test_images_are_cut_around_the_centre_and_resized(tmp_path):
    """A wide and a tall picture keep their middle; a turned photograph stands upright; grey is stretched."""
    wide = np.zeros((20, 60, 3), dtype=np.uint8)
    wide[:, 20:40] = (10, 200, 30)
    for pixels in (wide, wide.transpose(1, 0, 2)):
        picture = pixels_of([Image.fromarray(np.ascontiguousarray(pixels))], (40, 40))
        assert picture.shape == (1, 3, 40, 40)
        assert torch.equal(picture, torch.tensor([10, 200, 30])[None, :, None, None].expand(1, 3, 40, 40) / 255)
    half = np.zeros((8, 8, 3), dtype=np.uint8)
    half[:4] = 255
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    Image.fromarray(half).save(tmp_path / "turned.png", exif=exif)
    assert pixels_of([tmp_path / "turned.png"], (8, 8))[0, 0, :, 0].tolist() == [0.0] * 4 + [1.0] * 4
    grey = np.full((8, 8, 3), 100, dtype=np.uint8)
    grey[2:4] = (50, 60, 70)
    normal = pixels_of([Image.fromarray(grey)], (8, 8), normalize=True)
    assert set(normal.unique().tolist()) == {0.0, 1.0} and torch.equal(normal[:, 0], normal[:, 2])


# --- runs and mistakes -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_of_an_official_config(files, tmp_path):
    """Official keys, both kinds, one after the other; the folder and the clips say what they were made from."""
    folder = "configs/inference/sparsectrl"
    common = {"controlnet_images": images(files), "L": 3, "controlnet_image_indexs": [0, -1], "H": 32, "W": 32}
    config = write_config(
        tmp_path / "official.yaml",
        entry(files, controlnet_path=str(files / "sparsectrl_rgb.safetensors"),
              controlnet_config=f"{folder}/latent_condition.yaml", **common),
        entry(files, controlnet_path=str(files / "sparsectrl_scribble.safetensors"), controlnet_scale=[1, 0.5, 1],
              controlnet_config=f"{folder}/image_condition.yaml", normalize_condition_images=True, **common),
    )  # fmt: skip
    out = animate(load_config(config), output_dir=tmp_path / "out", device="cpu")
    first, second = (flat(read_metadata(path)) for path in sorted((out / "sample").iterdir()))
    known = yaml.safe_load((out / "config.yaml").read_text())["provenance"]["weights"]
    for settings, kind in ((first, "rgb"), (second, "scribble")):
        for key, name in (("controlnet_path", f"sparsectrl_{kind}.safetensors"), ("controlnet_images[1]", "b.png")):
            assert settings[key] == {"path": str(files / name), "sha256": known[str(files / name)]}
        assert settings["controlnet_image_indexs"] == [0, -1]
    assert second["controlnet_scale"] == [1, 0.5, 1] and second["normalize_condition_images"] is True
    json.dumps(second)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"controlnet_path": ""},
            "controlnet_images needs a SparseCtrl encoder: set controlnet_path, or",
        ),
        (
            {"controlnet_path": "", "controlnet_images": [], "controlnet_scale": 2.0},
            "controlnet_scale needs a SparseCtrl",
        ),
        ({"controlnet_image_indexs": [0, 1]}, "controlnet_image_indexs: got 2 frame numbers for 1 condition images"),
        ({"controlnet_images": ["a.png"] * 2}, "controlnet_image_indexs: got 1 frame numbers for 2 condition images"),
        ({"controlnet_image_indexs": [2]}, r"got frame 2, expected 0 to 1, or -1 \(the last\) to -2"),
        ({"controlnet_image_indexs": [-3]}, "got frame -3, expected 0 to 1"),
        ({"controlnet_images": ["a.png"] * 2, "controlnet_image_indexs": [1, -1]}, "got frame 1 twice"),
        ({"controlnet_images": ["a.png"] * 3}, "got 3 condition images, expected 1 to 2, the frames of the clip"),
        ({"controlnet_scale": [1.0, 1.0, 1.0]}, "controlnet_scale: got 3 scales, expected one for all frames, or one"),
        ({"controlnet_scale": -1.0}, "controlnet_scale: got -1.0, expected at least 0"),
        ({"controlnet_images": ["none.png"]}, r"controlnet_images\[0\]: there is no none.png"),
        ({"controlnet_images": ["{nano}/mm_v3.safetensors"]}, "expected a picture .*: it is none"),
        ({"controlnet_path": "{nano}/mm_v3.safetensors"}, "this is a motion module, not a SparseCtrl encoder"),
        ({"controlnet_path": "v3_sd15_sparsectrl_rgb.ckpt"}, "download it from https://huggingface.co/guoyww"),
        ({"motion_module": "{nano}/sparsectrl_rgb.safetensors"}, "use it as `controlnet_path: .*safetensors` and"),
        (
            {"controlnet_config": "configs/inference/sparsectrl/image_condition.yaml"},
            "encoder of kind scribble, but the weights are of kind rgb: use .*latent_condition.yaml",
        ),
        ({"controlnet_config": "configs/inference/inference-v3.yaml"}, "expected controlnet_additional_kwargs alone"),
        ({"L": 33, "max_frames": 0, "motion_module": ""}, "L: got 33 frames at a time, expected at most 32"),
        (
            {"L": 40, "window_schedule": "open", "window_length": 33, "motion_module": ""},
            "got 33 frames at a time, expected at most 32",
        ),
    ],
)
def test_mistakes_are_named_before_anything_is_loaded(files, tmp_path, monkeypatch, values, message):
    monkeypatch.chdir(files)

    def place(value):
        if isinstance(value, list):
            return [place(item) for item in value]
        return value.replace("{nano}", str(files)) if isinstance(value, str) else value

    good = {"controlnet_path": "{nano}/sparsectrl_rgb.safetensors", "controlnet_images": ["a.png"]}
    path = write_config(tmp_path / "bad.yaml", entry(files, **{k: place(v) for k, v in (good | values).items()}))
    with pytest.raises(UserError, match=message) as error:
        check_requests(load_config(path).entries)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"controlnet_frame_indices": [4]}, "controlnet_frame_indices: got frame 4, expected 0 to 3"),
        ({"controlnet_conditioning_scale": [1.0, 2.0]}, "controlnet_conditioning_scale: got 2 scales"),
        ({"conditioning_frames": torch.zeros(1, 3, 8, 8)}, r"shape \(1, 3, 8, 8\), expected \(1, 3, 64, 64\)"),
        ({"controlnet_frame_indices": []}, "got 0 frame numbers for 1 condition images"),
        ({"conditioning_frames": "none.png"}, "there is no none.png"),
        ({"num_frames": 40, "windows": Windows(length=33)}, "expected at most 32"),
    ],
)
def test_mistakes_of_a_call_are_named(controlled, files, arguments, message):
    with pytest.raises(UserError, match=message):
        controlled("fox", **{**CALL, "conditioning_frames": images(files)[:1], **arguments})


def test_images_need_an_encoder(pipeline, files):
    with pytest.raises(UserError, match="conditioning_frames needs a SparseCtrl encoder: set controlnet_path"):
        pipeline("fox", **CALL, conditioning_frames=images(files)[:1])


def test_a_config_that_contradicts_the_weights(files, tmp_path):
    source = REPOSITORY / "configs/inference/sparsectrl/latent_condition.yaml"
    (tmp_path / "four.yaml").write_text(source.read_text().replace("heads: 8", "heads: 4"))
    values = entry(files, controlnet_path=str(files / "sparsectrl_rgb.safetensors"))
    values |= {"controlnet_images": images(files)[:1], "controlnet_config": str(tmp_path / "four.yaml")}
    with pytest.raises(UserError, match="four.yaml: got num_attention_heads 4, but the SparseCtrl encoder has 8"):
        AnimateDiffPipeline.from_config(write_config(tmp_path / "x.yaml", values), device="cpu")


def test_longer_than_trained_on_request(files, tmp_path):
    values = entry(files, controlnet_path=str(files / "sparsectrl_rgb.safetensors"), max_frames=40, L=34)
    pipe = AnimateDiffPipeline.from_config(write_config(tmp_path / "x.yaml", values), device="cpu")  # images: by calls
    assert pipe.model.sparsectrl.config.unet.motion.max_frames == 40


def test_images_of_shipped_configs_are_there():
    for path in sorted((REPOSITORY / "configs/animate").glob("sparsectrl*.yaml")):
        for config in load_config(path).entries:
            pictures = [f.path for option, f in files_of(config).items() if option.startswith("sparsectrl.images")]
            assert pictures and all(find_file(file) for file in pictures)
