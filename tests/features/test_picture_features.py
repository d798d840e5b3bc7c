"""ControlNet, IP-Adapter, PIA, AnimateLCM-I2V and CameraCtrl through files, options and the sampler."""

import json
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import torch
from einops import rearrange
from PIL import Image

from animatediff.checkpoints.identify import identify
from animatediff.config.prompt_yaml import load_config
from animatediff.diffusion.schedule import NoiseSchedule
from animatediff.features import image_to_video as i2v_feature
from animatediff.features import pia as pia_feature
from animatediff.features.camera_motion import camera
from animatediff.features.controlnet import active, controlnet, read_hints
from animatediff.features.feature import Feature, Run
from animatediff.features.guide_pictures import picture_latents
from animatediff.features.ip_adapter import ip_adapter
from animatediff.features.noise import seeded
from animatediff.features.registry import FEATURES
from animatediff.features.sparsectrl import sparsectrl
from animatediff.media.pictures import fit_frames
from animatediff.media.video import read_video
from animatediff.models.controlnet_network import ControlNet
from animatediff.pipeline import memory as memory_module
from animatediff.pipeline.headers import check_requests
from animatediff.pipeline.pipeline import AnimateDiffPipeline
from animatediff.pipeline.sample import network
from animatediff.utils import UserError
from scripts.animate import main
from tests.checkpoints.synthetic import sparsectrl_tensors, write
from tests.control import (
    CONFIG,
    EXPECTED,
    TABLES,
    clip_vision_tensors,
    controlnet_tensors,
    ip_adapter_tensors,
    video,
    write_image_encoder,
)
from tests.families import FOLDER, cameractrl_tensors, conditioned_motion_tensors, expected
from tests.models.test_golden import GOLDEN, assert_close, golden
from tests.nano import entry, write_config, write_files

CONTEXT = EXPECTED["input.context"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = write_files(tmp_path_factory.mktemp("nano"))
    write(folder / "control.safetensors", controlnet_tensors())
    write(folder / "control_b.safetensors", controlnet_tensors("nano-control-b"))
    write(folder / "shuffle.safetensors", controlnet_tensors())
    for variant in ("base", "plus"):
        write(folder / f"{variant}.safetensors", ip_adapter_tensors(variant))
    write_image_encoder(folder / "image_encoder")
    write(folder / "pia.safetensors", conditioned_motion_tensors("pia"))
    write(folder / "i2v.safetensors", conditioned_motion_tensors("animatelcm_i2v"))
    write(folder / "rgb.safetensors", sparsectrl_tensors("rgb"))
    write(folder / "cameractrl.safetensors", cameractrl_tensors())
    for name in ("hint", "hint_b"):
        (hints := folder / name.replace("hint", "hints")).mkdir()
        for i, hint in enumerate(EXPECTED[f"input.{name}"][0].permute(1, 2, 3, 0).numpy()):
            Image.fromarray(hint).save(hints / f"{i}.png")
    for i, mask in enumerate(EXPECTED["input.masks"].numpy()):
        Image.fromarray((255 * mask).astype(np.uint8)).save(folder / f"mask{i}.png")
    for name in "ab":
        Image.fromarray(EXPECTED[f"input.image_{name}"].numpy()).save(folder / f"{name}.png")
    return folder


def pipeline(folder: Path, tmp_path: Path, **values: object) -> AnimateDiffPipeline:
    path = write_config(tmp_path / "config.yaml", entry(folder, H=64, W=128, L=5, **values))
    return AnimateDiffPipeline.from_config(path, device="cpu")


def latents(pipe: AnimateDiffPipeline, *, steps: int = 1, **options: object) -> torch.Tensor:
    """(1, f, c, h, w) after a golden run: unconditional entry 0, conditional entry 1 of the golden context."""
    call = {"prompt_embeds": CONTEXT[1:], "negative_prompt_embeds": CONTEXT[:1], "latents": EXPECTED["input.noise"]}
    call |= {"num_frames": 5, "num_inference_steps": steps, "guidance_scale": 7.5, "output_type": "latent"}
    return pipe(**(call | options)).frames.transpose(1, 2)


def net(folder: Path, name: str = "control", **values: object) -> dict[str, object]:
    return {"path": str(folder / f"{name}.safetensors"), "images": str(folder / "hints")} | values


def adapter(folder: Path, name: str = "base", **values: object) -> dict[str, object]:
    return {"path": str(folder / f"{name}.safetensors"), "images": str(folder / "a.png")} | values


@pytest.mark.slow
def test_a_golden_run_with_controlnet_and_ip_adapter(folder, tmp_path):
    pipe = pipeline(
        folder, tmp_path, controlnet=net(folder, scale=0.8, end=0.6), ip_adapter=[adapter(folder, scale=0.6)],
        image_encoder=str(folder / "image_encoder"),
    )  # fmt: skip
    assert_close(latents(pipe, steps=10), EXPECTED["pipeline.v3.latents"].transpose(1, 2), 1e-4)


def test_parts_of_the_steps():
    for case in TABLES["control_guidance"]:
        steps = case["steps"]
        assert [active(case["start"], case["end"], i, steps) for i in range(steps)] == [bool(k) for k in case["keep"]]


def resolved(pipe: AnimateDiffPipeline, **options: object):
    call = {"num_frames": 5, "num_inference_steps": 10, "guidance_scale": 7.5, "prompt": "x"}
    return pipe.request_for(call | options)


def predict(
    pipe: AnimateDiffPipeline, *features: Feature, frames: list[int] | None = None, **options: object
) -> torch.Tensor:
    """The network's prediction for the golden latents of both parts of the batch, under features."""
    run = Run(
        pipe.model, resolved(pipe, **options), NoiseSchedule(pipe.model.schedule), torch.tensor([981, 481]),
        lambda frames: CONTEXT.to(pipe.dtype), ("unconditional", "conditional"),
    )  # fmt: skip
    at = torch.arange(5) if frames is None else torch.tensor(frames)
    with torch.no_grad(), ExitStack() as stack:
        denoise = network(run)
        for feature in features:
            denoise = stack.enter_context(feature(denoise, run))
        return denoise(golden("input.latents")[:, at], torch.tensor([481, 481]), at)


@pytest.fixture(scope="module")
def image(folder, tmp_path_factory) -> AnimateDiffPipeline:
    """Without a motion module: two ControlNets, and the adapters base, base and plus."""
    nets = [net(folder), net(folder, "control_b")]
    adapters = [adapter(folder), adapter(folder), adapter(folder, "plus")]
    encoder = str(folder / "image_encoder")
    tmp_path = tmp_path_factory.mktemp("image")
    return pipeline(folder, tmp_path, motion_module="", controlnet=nets, ip_adapter=adapters, image_encoder=encoder)


@pytest.mark.parametrize(
    ("name", "first", "second"),
    [
        ("control.unet_0.8", {"scale": 0.8}, {"scale": 0}),
        ("control.unet_frame_scales", {"scale": CONFIG["frame_scales"]}, {"scale": 0}),
        ("control.unet_guess", {"scale": 0.8, "guess_mode": True}, {"scale": 0}),
        ("control.unet_two", {"scale": 0.8}, {"scale": 0.5, "images": "hints_b"}),
        ("unet.image", {"end": 0.4}, {"scale": 0}),
    ],
)
def test_controlnet(folder, image, name, first, second):
    if "images" in second:
        second = second | {"images": str(folder / second["images"])}
    nets = [net(folder, **first), net(folder, "control_b", **second)]
    assert_close(predict(image, controlnet, controlnet=nets), video(name))


def test_a_pooled_controlnet_is_for_the_conditional_half(folder, image, tmp_path):
    pipe = pipeline(folder, tmp_path, motion_module="", controlnet=net(folder, "shuffle", scale=0.8))
    assert_close(predict(pipe, controlnet), video("control.unet_pooled"))
    whole, halves = (latents(pipe, split_guidance=split) for split in (False, True))
    assert_close(halves, whole)


def test_frames_without_a_hint_are_left_alone(folder, image):
    """Keyframes of hints: what the others are told, is nothing."""
    hints = {i: str(folder / f"hints/{i}.png") for i in (1, 3)}
    nets = [net(folder, images=hints, scale=0.8), net(folder, "control_b", scale=0)]
    got, plain, full = predict(image, controlnet, controlnet=nets), video("unet.image"), video("control.unet_0.8")
    assert_close(got[:, [0, 2, 4]], plain[:, [0, 2, 4]])
    assert_close(got[:, [1, 3]], full[:, [1, 3]])


@pytest.mark.slow
def test_residuals_of_sparsectrl_and_controlnets_add_up(folder, tmp_path):
    options = {"controlnet_path": str(folder / "rgb.safetensors"), "controlnet_images": str(folder / "a.png")}
    pipe = pipeline(folder, tmp_path, controlnet=[net(folder, scale=0.8), net(folder, "control_b")], **options)
    seen = []
    hook = pipe.unet.register_forward_pre_hook(lambda m, args, kwargs: seen.append(kwargs), with_kwargs=True)
    predict(pipe, controlnet, sparsectrl, **options)
    predict(pipe, controlnet)
    predict(pipe, sparsectrl, **options)
    hook.remove()
    both, *alone = ([*inputs["down_residuals"], inputs["mid_residual"]] for inputs in seen)
    for got, one, other in zip(both, *alone, strict=True):
        assert torch.allclose(got, one + other, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("memory", [{"split_guidance": True, "chunk_tokens": 64}, {"offload": "blocks"}], ids=str)
def test_everything_together(folder, tmp_path, monkeypatch, memory):
    """A video made anew in windows, with a LoRA, two motion modules and all that pictures and cameras can tell;
    in less memory, too: nothing mistakes one part of guidance for another, or finds weights that are away."""
    monkeypatch.setattr(memory_module, "has_own_memory", lambda device: True)
    nets = [net(folder, images=(), preprocessor="invert"), net(folder, "control_b", scale=0.3, guess_mode=True)]
    options = dict(
        video=str(folder / "hints"), camera=FAMILIES["camera"](folder)["camera"], controlnet=nets,
        ip_adapter=[adapter(folder), adapter(folder, "plus", layers="style")],
        image_encoder=str(folder / "image_encoder"),
        controlnet_path=str(folder / "rgb.safetensors"), controlnet_images=str(folder / "a.png"),
        extra_motion_modules={"path": str(folder / "mm_v2.safetensors"), "scale": 0.5}, motion_scale=0.9,
        lora_model_path=str(folder / "kohya.safetensors"), pag_scale=1.0,
        windows={"schedule": "open", "length": 3, "overlap": 1},
    )  # fmt: skip
    pipe, held = (pipeline(folder, tmp_path, **options, **more) for more in ({}, memory))
    call = {"video": str(folder / "hints"), "strength": 1.0, "controlnet_images": str(folder / "a.png")}
    clip = latents(pipe, steps=2, latents=None, generator=torch.Generator().manual_seed(3), **call)
    again = latents(pipe, steps=2, latents=None, generator=torch.Generator().manual_seed(3), **call)
    assert clip.isfinite().all() and torch.equal(clip, again)
    less = latents(held, steps=2, latents=None, generator=torch.Generator().manual_seed(3), **call)
    assert torch.allclose(clip, less, atol=1e-2)
    without = latents(pipe, steps=2, latents=None, generator=torch.Generator().manual_seed(3), **call, controlnet=[])
    assert not torch.allclose(clip, without, atol=1e-2)


def test_windows_share_the_residuals_of_common_frames(folder, tmp_path, monkeypatch):
    """Each frame goes through the ControlNet once per step, whatever the windows; the clip is that of one window."""
    pipe, rows = pipeline(folder, tmp_path, controlnet=net(folder, scale=0.8)), []
    forward = ControlNet.forward
    monkeypatch.setattr(ControlNet, "forward", lambda self, x, *a: rows.append(x.shape[:2]) or forward(self, x, *a))
    windowed = {"schedule": "static", "length": 3, "overlap": 1}
    latents(pipe, steps=2, windows=windowed)
    assert sum(b * f for b, f in rows) == 2 * 2 * 5  # steps, halves, frames
    control = pipe.model  # nothing is left over from a step
    assert control.networks["controlnets"] is not None


@pytest.mark.parametrize(
    ("name", "adapters"),
    [
        ("ip.base.unet_0.6", [{"scale": 0.6}]),
        ("ip.unet_frame_scales", [{"scale": [0.6 * s for s in CONFIG["frame_scales"]]}]),
        ("ip.unet_two_images", [{"scale": 0.6, "images": ["a", "b"]}]),
        ("ip.unet_masks", [{"scale": 0.6, "images": ["a", "b"], "masks": ["mask0", "mask1"]}]),
        ("ip.unet_travel", [{"scale": 0.6, "images": {0: "a", 4: "b"}}]),
        ("ip.unet_base_and_plus", [{"scale": 0.6}, {}, {"scale": 0.3, "images": ["b"]}]),
        ("ip.unet_layers", [{}, {}, {"layers": CONFIG["layer_scales"]}]),
        ("unet.image", [{"start": 0.7}]),
    ],
)
def test_ip_adapter(folder, image, name, adapters):
    given = []
    for variant, values in zip(("base", "base", "plus"), [*adapters, {}, {}], strict=False):
        values = dict(values) or {"scale": 0}
        for key in ("images", "masks"):
            if isinstance(files := values.get(key), dict):
                values[key] = {frame: str(folder / f"{file}.png") for frame, file in files.items()}
            elif files:
                values[key] = [str(folder / f"{file}.png") for file in files]
        given.append(adapter(folder, variant, **values))
    assert_close(predict(image, ip_adapter, ip_adapter=given), video(name))
    assert_close(predict(image), video("unet.image"))


@pytest.mark.parametrize("scale", [1.0, 0.6])
def test_camera(folder, tmp_path, scale):
    camera_options = {"path": str(folder / "cameractrl.safetensors"), "poses": str(FOLDER / "pose.txt"), "scale": scale}
    pipe = pipeline(folder, tmp_path, camera=camera_options)
    expected_video = rearrange(expected("cameractrl")[f"unet.scale{scale}"], "b c f h w -> b f c h w")
    assert_close(predict(pipe, camera), expected_video)
    assert_close(predict(pipe), golden("unet.v3.t481"))


def test_a_window_has_poses_relative_to_its_first_frame(folder, tmp_path):
    """A camera that moves evenly looks the same from every window."""
    pipe = pipeline(folder, tmp_path, camera={"path": str(folder / "cameractrl.safetensors"), "move": "pan_left"})
    seen = []
    hook = pipe.model.networks["camera"].pose_encoder.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    predict(pipe, camera, frames=[0, 1, 2])
    predict(pipe, camera, frames=[2, 3, 4])
    hook.remove()
    assert torch.allclose(seen[0], seen[1], atol=1e-6) and seen[0].shape == (3, 6, 64, 128)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("mask0", {"motion": "small"}),
        ("mask1", {}),
        ("mask2.cond2", {"motion": "large", "frame": 2}),
        ("mask6", {"motion": "large", "style_transfer": True}),
    ],
)
def test_pia(folder, tmp_path, monkeypatch, name, options):
    monkeypatch.setattr(pia_feature, "picture_latents", lambda *_: expected("pia")["input.image_latents"][0])
    options = {"image": str(folder / "a.png")} | options
    pipe = pipeline(folder, tmp_path, motion_module=str(folder / "pia.safetensors"), pia=options)
    assert_close(predict(pipe, pia_feature.pia), rearrange(expected("pia")[f"unet.{name}"], "b c f h w -> b f c h w"))


@pytest.mark.slow
@pytest.mark.parametrize("drift", [0.0, 0.8])
def test_image_to_video(folder, tmp_path, monkeypatch, drift):
    monkeypatch.setattr(i2v_feature, "picture_latents", lambda *_: 0.18215 * GOLDEN["vae.mean"][0])
    options = {"image": str(folder / "a.png"), "drift": drift}
    pipe = pipeline(folder, tmp_path, motion_module=str(folder / "i2v.safetensors"), i2v=options)
    got = predict(pipe, i2v_feature.image_to_video, num_inference_steps=6, guidance_scale=2.0)
    assert_close(got, rearrange(expected("animatelcm_i2v")[f"unet.drift{drift}"], "b c f h w -> b f c h w"))
    schedule = pipe.model.schedule
    assert (schedule.beta_end, schedule.lcm_timesteps) == (0.014, 200)
    assert resolved(pipe, num_inference_steps=None, guidance_scale=None).sampling.sampler == "lcm"


def test_pictures_are_encoded_at_the_size_of_the_clip(folder, tmp_path):
    pipe = pipeline(
        folder, tmp_path, motion_module=str(folder / "pia.safetensors"), pia={"image": str(folder / "a.png")}
    )
    run = Run(pipe.model, resolved(pipe), None, None, None)
    picture = fit_frames([Image.open(folder / "a.png").convert("RGB")], 64, 128)
    mean, _ = pipe.vae.encode(picture)
    assert_close(picture_latents(str(folder / "a.png"), run), 0.18215 * mean[0], 1e-6)


def test_a_call_cannot_load_networks(folder, image):
    with pytest.raises(UserError, match="controlnet: got 1, expected 2, as many as the pipeline has loaded"):
        resolved(image, controlnet=[net(folder)])
    with pytest.raises(UserError, match="ip_adapter: got 1, expected 3"):
        resolved(image, ip_adapter=adapter(folder))
    assert resolved(image, controlnet=[]).controlnets.nets == ()  # may leave them out


@pytest.mark.slow
@pytest.mark.parametrize("family", ["controlnet", "ip_adapter", "pia", "i2v", "camera"])
def test_half_precision(folder, tmp_path, family):
    """Nothing stays in another type than the network's, and the prediction is near that of float32."""
    path = write_config(tmp_path / "x.yaml", entry(folder, H=64, W=128, L=5, **FAMILIES[family](folder)))
    full, half = (AnimateDiffPipeline.from_config(path, device="cpu", dtype=d) for d in ("float32", "bfloat16"))
    expected, got = (predict(pipe, *FEATURES, num_inference_steps=4, guidance_scale=2.0) for pipe in (full, half))
    # Activations of all layers are rounded to 8 bits: the relative error of a network of 60 layers, and not more.
    assert (got - expected).norm() / expected.norm() < 2**-8 * 60**0.5 * 2


FAMILIES = {
    "controlnet": lambda f: {"controlnet": [net(f, images=str(f / "a.png"), preprocessor="invert")]},
    "ip_adapter": lambda f: {"ip_adapter": adapter(f), "image_encoder": str(f / "image_encoder")},
    "pia": lambda f: {"motion_module": str(f / "pia.safetensors"), "pia": {"image": str(f / "a.png")}},
    "i2v": lambda f: {"motion_module": str(f / "i2v.safetensors"), "i2v": {"image": str(f / "a.png")}},
    "camera": lambda f: {"camera": {"path": str(f / "cameractrl.safetensors"), "move": ["zoom_in", "pan_left"]}},
}


@pytest.mark.parametrize(
    "family", [f if f == "controlnet" else pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES]
)
def test_a_clip_from_the_command_line(folder, tmp_path, monkeypatch, capsys, family):
    """A run, and a second one from the settings that the first clip carries: the same clip."""
    monkeypatch.chdir(tmp_path)
    options = {"L": 2, "H": 64, "W": 64, "format": "png"} | FAMILIES[family](folder)
    main(["--config", str(write_config(tmp_path / "x.yaml", entry(folder, **options))), "--output-dir", "one"])
    (clip,) = (tmp_path / "one/sample").iterdir()
    main(["--config", str(next(clip.glob("*.png"))), "--output-dir", "two"])
    (again,) = (tmp_path / "two/sample").iterdir()
    frames, same = (read_video(path)[0] for path in (clip, again))
    assert torch.equal(frames, same) and frames.float().std() > 1


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("windows", [None, {"schedule": "open", "length": 2}])
def test_a_batch_is_its_clips(folder, tmp_path, family, windows):
    pipe = pipeline(folder, tmp_path, **FAMILIES[family](folder))
    call = {
        "num_frames": 3,
        "num_inference_steps": 2,
        "guidance_scale": 2.0,
        "windows": windows,
        "output_type": "latent",
    }
    call |= {family: {"image": str(folder / "a.png")}} if family in ("pia", "i2v") else {}
    prompts = ["a fox", "very long " * 40]
    both = pipe(prompts, generator=[seeded(0), seeded(1)], **call).frames
    for i, prompt in enumerate(prompts):
        alone = pipe(prompt, generator=seeded(i), **call).frames
        assert (both[i : i + 1] - alone).norm() < 1e-4 * alone.norm()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"controlnet": {"path": "control", "images": "hints", "end": 0}}, "controlnet.end: got 0"),
        ({"controlnet": {"path": "control"}}, "controlnet: got no images, expected hints, or a video"),
        ({"controlnet": {"path": "mm_v3", "images": "hints"}}, r"controlnet\[0\].path: .*this is a motion module, not"),
        ({"controlnet": {"path": "control", "images": "nowhere"}}, r"controlnet\[0\].images\[0\]: there is no .*nowh"),
        ({"controlnet": {"path": "control", "images": "hints"}, "L": 3}, ""),
        ({"controlnet": {"path": "control", "images": "hints"}, "L": 7}, "got 5 hints for 7 frames, expected one"),
        ({"controlnet": {"path": "control", "images": "a.png", "preprocessor": "inpaint"}}, "inpaint without a mask"),
        ({"controlnet": {"path": "control", "images": "a.png", "settings": {"low": 3}}}, "none: got the setting 'low'"),
        ({"ip_adapter": {"path": "base", "images": "a.png"}}, "ip_adapter needs the image encoder it was trained with"),
        ({"ip_adapter": {"path": "base"}, "image_encoder": "image_encoder"}, "ip_adapter: got no images"),
        ({"ip_adapter": {"path": "base", "images": "a.png", "layers": "styl"}, "image_encoder": "image_encoder"},
         "layers: got 'styl', expected one of all, style"),
        ({"pia.image": "a.png"}, "pia.image needs PIA's file as motion_module, got mm_v3"),
        ({"motion_module": "pia"}, "pia.safetensors animates a picture, got none: set pia.image"),
        ({"motion_module": "i2v", "pia.image": "a.png"}, "pia.image needs PIA's file as motion_module, got i2v"),
        ({"camera": {"path": "cameractrl", "move": "zoom_in"}, "H": 72}, "H: got 72 pixels, expected a multiple of 64"),
        ({"camera": {"path": "cameractrl"}}, "got neither of camera.poses and camera.move"),
        ({"camera": {"move": "zoom_in"}}, "camera.move needs a CameraCtrl file: set camera.path"),
        ({"camera": {"path": "cameractrl", "move": "zoom_in"}, "L": 20}, "got 20 frames at a time, expected at most"),
        ({"camera": {"path": "cameractrl", "poses": "pose.txt"}, "L": 12}, "got 8 poses in .* for 12 frames"),
    ],
)  # fmt: skip
def test_mistakes_are_named_before_anything_is_loaded(folder, tmp_path, options, message):
    (folder / "pose.txt").write_text((FOLDER / "pose.txt").read_text())

    def located(value: object, key: str = "") -> object:
        if isinstance(value, dict):
            return {k: located(v, k) for k, v in value.items()}
        if key in ("path", "motion_module"):
            return str(folder / f"{value}.safetensors")
        return str(folder / value) if key in ("images", "image_encoder", "pia.image", "poses") else value

    config = write_config(tmp_path / "x.yaml", entry(folder, **({"H": 64, "W": 64} | located(options))))
    if not message:
        check_requests(load_config(config).entries)
        return
    with pytest.raises(UserError, match=message):
        check_requests(load_config(config).entries)


def test_an_encoder_of_another_width_is_refused(folder, tmp_path):
    clip = CONFIG["clip"] | {"projection_dim": 32}
    other = tmp_path / "other"
    other.mkdir()
    tensors = clip_vision_tensors() | {"visual_projection.weight": torch.zeros(32, 48)}
    write(other / "model.safetensors", tensors)
    (other / "config.json").write_text(json.dumps(clip))
    with pytest.raises(UserError, match="with embeddings of width 32, expected 24 for .*base.safetensors"):
        pipeline(folder, tmp_path, ip_adapter=adapter(folder), image_encoder=str(other))


def test_an_inpaint_hint_is_marked_where_it_is_painted_anew(folder, tmp_path):
    Image.fromarray(np.where(np.arange(64)[None] < 32, 255, 0).astype(np.uint8).repeat(64, 0)).save(folder / "half.png")
    Image.open(folder / "a.png").resize((64, 64)).save(folder / "square.png")
    options = {"controlnet": net(folder, images=(), preprocessor="inpaint"), "video": str(folder / "square.png")}
    options |= {"mask": str(folder / "half.png"), "H": 64, "W": 64}
    (request,) = load_config(write_config(tmp_path / "x.yaml", entry(folder, **options))).entries
    hints, rows = read_hints(request.controlnets.nets[0], request)
    assert hints.shape == (2, 3, 64, 64) and rows == [0, 1]
    assert (hints[..., :32] == -1).all() and (hints[..., 33:] >= 0).all()


@pytest.mark.slow
def test_a_call_brings_the_pictures_that_its_config_has_not(folder, tmp_path):
    """Its other values stay the config's; without pictures at all the call is refused."""
    options = {"scale": 0.8, "end": 0.6}
    without = {"controlnet": {"path": str(folder / "control.safetensors")} | options}
    without |= {"ip_adapter": {"path": str(folder / "base.safetensors"), "scale": 0.6}}
    encoder = str(folder / "image_encoder")
    pipe = pipeline(folder, tmp_path, image_encoder=encoder, **without)
    with pytest.raises(UserError, match="controlnet: got no images"):
        latents(pipe, steps=2)
    images = {"controlnet": {"images": str(folder / "hints")}, "ip_adapter": [{"images": str(folder / "a.png")}]}
    got = latents(pipe, steps=2, **images)
    whole = pipeline(
        folder,
        tmp_path,
        image_encoder=encoder,
        controlnet=net(folder, **options),
        ip_adapter=adapter(folder, scale=0.6),
    )
    assert torch.equal(got, latents(whole, steps=2))
    picture = str(folder / "a.png")
    pia = pipeline(folder, tmp_path, motion_module=str(folder / "pia.safetensors"))
    assert latents(pia, pia={"image": picture}).isfinite().all()
    with pytest.raises(UserError, match="animates a picture, got none"):
        latents(pia)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["pia", "i2v"])
def test_what_a_saved_motion_module_has_for_a_picture(folder, tmp_path, family):
    pipe = pipeline(folder, tmp_path, **FAMILIES[family](folder))
    image = {family: {"image": str(folder / "a.png")}}
    saved = AnimateDiffPipeline.from_config(pipe.save(tmp_path / "saved") / "config.yaml", device="cpu")
    assert identify(tmp_path / "saved/motion_module.safetensors").kind == {"i2v": "animatelcm-i2v"}.get(family, family)
    options = {"steps": 2, "guidance_scale": 2.0, "height": 64, "width": 128, **image}
    again, first = (latents(p, generator=torch.Generator().manual_seed(0), **options) for p in (saved, pipe))
    assert torch.equal(again, first)
