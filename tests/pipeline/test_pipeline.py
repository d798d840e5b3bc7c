"""The pipeline's call: every argument does what it says, and mistakes are named."""

import numpy as np
import pytest
import torch

from animatediff.config.request import Travel, Windows
from animatediff.features.noise import make_noise, seeded
from animatediff.features.windows import windows_of_step
from animatediff.pipeline.pipeline import AnimateDiff, AnimateDiffPipeline
from animatediff.pipeline.prompts import encode_prompts
from animatediff.utils import UserError
from tests.nano import entry, write_config

FOX, NEGATIVE = "a red fox", "worst quality"
CALL = {"num_frames": 2, "height": 16, "width": 16, "num_inference_steps": 2}
WELL_SIZED = {"height": 64, "width": 64}  # smaller, and the norms of single pixels blow rounding errors up
LONG = ", ".join(["a red fox running through the snow"] * 12)  # more than 75 tokens


@pytest.fixture
def run(pipeline):
    """Clips (b, 3, f, H, W) of a small call."""

    def run(prompt=FOX, *, seed=3, **arguments):
        arguments = {"generator": seeded(seed), "output_type": "tensor"} | CALL | arguments
        return pipeline(prompt, **arguments).frames

    return run


def encode(pipeline, prompt, negative_prompt, **options):
    """Contexts of prompts and negative prompts."""
    given = {"prompt": prompt, "negative_prompt": negative_prompt, "num_frames": 5, **options}
    return encode_prompts(pipeline.model, pipeline.request_for(given))


def test_output_types(pipeline, run):
    video = run()
    assert video.shape == (1, 3, 2, 16, 16) and video.dtype == torch.float32
    assert 0 <= video.min() and video.max() <= 1 and video.std() > 0
    assert torch.equal(run(output_type="pt"), video.transpose(1, 2))
    array = run(output_type="np")
    assert array.shape == (1, 2, 16, 16, 3) and np.array_equal(array[0], video[0].permute(1, 2, 3, 0).numpy())
    (images,) = run(output_type="pil")
    assert len(images) == 2 and np.abs(np.asarray(images[1]) / 255 - array[0, 1]).max() <= 0.5 / 255 + 1e-6
    assert run(output_type="latent").shape == (1, 4, 2, 2, 2)
    (plain,) = pipeline(FOX, **CALL, generator=seeded(3), output_type="tensor", return_dict=False)
    assert torch.equal(plain, video)
    assert torch.equal(pipeline(FOX, **CALL, generator=seeded(3), output_type="tensor").videos, video)


def test_latents_are_what_the_generator_draws(run):
    noise = make_noise(3, (1, 4, 2, 2, 2)).transpose(1, 2)
    assert torch.equal(run(latents=noise, generator=None), run())


def test_a_batch_is_its_clips(run):
    """Two prompts, each with its own negative prompt and generator, equal two runs."""
    generators = [seeded(3), seeded(4)]
    both = run([FOX, "snow"], negative_prompt=[NEGATIVE, "blue"], generator=generators, **WELL_SIZED)
    for i, (prompt, negative) in enumerate(((FOX, NEGATIVE), ("snow", "blue"))):
        alone = run(prompt, negative_prompt=negative, seed=3 + i, **WELL_SIZED)
        assert torch.allclose(both[i : i + 1], alone, atol=1e-4)


def test_num_videos_per_prompt(run):
    clips = run([FOX, "snow"], num_videos_per_prompt=2, generator=[seeded(i) for i in range(4)], **WELL_SIZED)
    assert len(clips) == 4
    assert torch.allclose(clips[1:2], run(seed=1, **WELL_SIZED), atol=1e-4)
    assert torch.allclose(clips[2:3], run("snow", seed=2, **WELL_SIZED), atol=1e-4)


def test_guidance_and_negative_prompt(run):
    plain = run()
    assert torch.equal(run(negative_prompt=""), plain)
    assert not torch.allclose(run(negative_prompt=NEGATIVE), plain, atol=1e-3)
    assert torch.equal(run(guidance_scale=1.0, negative_prompt=NEGATIVE), run(guidance_scale=1.0))
    assert torch.equal(run(guidance_scale=0.0), run(guidance_scale=1.0))
    assert not torch.allclose(run(guidance_scale=1.0), plain, atol=1e-3)


def test_embeddings_stand_for_prompts(pipeline, run):
    context, negative = encode(pipeline, FOX, NEGATIVE)
    expected = run(negative_prompt=NEGATIVE, **WELL_SIZED)
    assert torch.equal(run(None, prompt_embeds=context, negative_prompt_embeds=negative, **WELL_SIZED), expected)
    alone = run(None, prompt_embeds=context, negative_prompt=NEGATIVE, **WELL_SIZED)
    assert torch.allclose(alone, expected, atol=1e-4)  # of other rounding: the negative prompt is encoded by itself


def test_prompts_travel_from_frame_to_frame(pipeline, run):
    """The text of each frame is what the network is told, whichever windows it sees; plain prompts stay."""
    calls = []
    hook = pipeline.model.unet.register_forward_pre_hook(lambda _, args: calls.append(args[2]))
    arguments = {"num_frames": 5, "windows": Windows("closed", 3, 1), "num_inference_steps": 1}
    clips = run([{0: FOX, 2: "snow"}, LONG], generator=[seeded(0), seeded(1)], **arguments, output_type="latent")
    hook.remove()
    assert clips.shape[0] == 2
    plain = encode(pipeline, [FOX, "snow", LONG], "")
    fox, snow, long = plain[0]
    windows = windows_of_step(Windows("closed", 3, 1), 0, 5)
    mixed = torch.stack([fox, (fox + snow) / 2, snow, (fox + 2 * snow) / 3, (2 * fox + snow) / 3])
    assert len(calls) == len(windows)
    for text, window in zip(calls, windows, strict=True):
        assert text.shape == (4, 3, 77 * 2, 40)
        assert torch.allclose(text[:2], plain[1][:1, None].expand(2, 3, -1, -1), atol=1e-5)
        assert torch.allclose(text[2], mixed[list(window)], atol=1e-5)
        assert torch.allclose(text[3], long.expand(3, -1, -1), atol=1e-5)


def test_equal_keyframes_are_a_plain_prompt(run):
    arguments = {"negative_prompt": NEGATIVE, "num_videos_per_prompt": 2, **WELL_SIZED}
    held = run({0: FOX, 1: FOX}, generator=[seeded(0), seeded(1)], travel=Travel("slerp"), **arguments)
    assert torch.allclose(held, run(generator=[seeded(0), seeded(1)], **arguments), atol=1e-4)


def test_prompt_weighting_is_off_unless_asked_for(run):
    weighted = "a (red:1.5) fox"
    assert not torch.allclose(run(weighted, prompt_weighting=True), run(weighted), atol=1e-3)
    assert not torch.allclose(run(weighted, prompt_weighting=True), run("a red fox"), atol=1e-3)
    assert torch.equal(run(FOX, prompt_weighting=True), run(FOX))
    one_weighs = run(negative_prompt="(blue:1.5)", prompt_weighting=True)
    assert not torch.allclose(one_weighs, run(negative_prompt="blue"), atol=1e-3)


def test_clip_skip(run):
    assert torch.equal(run(clip_skip=1), run())
    assert not torch.allclose(run(clip_skip=2), run(), atol=1e-3)


def test_long_prompts_are_not_cut(run):
    """The words past the 75th token count, and a long negative prompt goes with a short prompt."""
    assert not torch.allclose(run(LONG), run(LONG + ", at night"), atol=1e-3)
    assert not torch.allclose(run(negative_prompt=LONG), run(negative_prompt=LONG + ", at night"), atol=1e-3)


def test_eta_draws_from_the_generator(run):
    noisy = run(eta=1.0)
    assert torch.equal(run(eta=1.0), noisy) and not torch.allclose(noisy, run(), atol=1e-3)


def test_steps_report_and_may_change_latents(pipeline, run):
    seen = []

    def record(pipe, step, timestep, tensors):
        assert pipe is pipeline
        seen.append((step, timestep, tuple(tensors["latents"].shape)))

    assert torch.equal(run(callback_on_step_end=record), run())
    assert seen == [(0, 501, (1, 4, 2, 2, 2)), (1, 1, (1, 4, 2, 2, 2))]
    zeros = run(callback_on_step_end=lambda *args: {"latents": 0 * args[3]["latents"]}, output_type="latent")
    assert not zeros.any()


def test_without_a_generator_every_run_differs(run):
    assert not torch.allclose(run(generator=None), run(generator=None), atol=1e-3)


def test_one_frame_and_chunks(run):
    assert run(num_frames=1).shape == (1, 3, 1, 16, 16)
    small, large = (run(num_frames=5, decode_chunk_size=size) for size in (2, 16))
    assert torch.allclose(small, large, atol=1e-4)


def test_long_clips(pipeline, run):
    """Longer than the module was trained for; a window that holds the whole clip changes nothing."""
    windows = Windows("open", length=4, overlap=1)
    sizes = []
    hook = pipeline.model.unet.conv_in.register_forward_hook(lambda *call: sizes.append(len(call[2])))
    try:
        clip = run(num_frames=34, windows=windows, output_type="latent", num_inference_steps=1)
    finally:
        hook.remove()
    assert clip.shape == (1, 4, 34, 2, 2) and clip.isfinite().all()
    assert set(sizes) == {2 * 4}, "with guidance, two halves of a window at a time"
    assert torch.equal(run(num_frames=4, windows=windows), run(num_frames=4))
    looped = run(num_frames=4, windows=Windows("closed", length=4, overlap=1))
    assert not torch.allclose(looped, run(num_frames=4), atol=1e-3)


def test_infer(pipeline, run):
    """mmagic's spelling gives the same clips."""
    assert AnimateDiff is AnimateDiffPipeline
    small = {"video_length": 2, "height": 16, "width": 16, "num_inference_steps": 2, "show_progress": False}
    samples = pipeline.infer(FOX, negative_prompt=NEGATIVE, seed=3, **small)["samples"]
    assert torch.equal(samples, run(negative_prompt=NEGATIVE))
    assert np.array_equal(pipeline.infer(FOX, seed=3, return_type="numpy", **small)["samples"], run().numpy())
    assert len(pipeline.infer([FOX, FOX], return_type="image", **small)["samples"]) == 2
    assert pipeline.infer(FOX, seed=-1, **small)["samples"].shape == (1, 3, 2, 16, 16)


def test_sizes_default_to_the_config(pipeline):
    assert pipeline(FOX, num_frames=1, num_inference_steps=1, output_type="np").frames.shape == (1, 1, 16, 16, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_frames": 0}, "num_frames: got 0"),
        ({"num_frames": 33}, "num_frames: got 33 frames, expected at most 32, .*by windows=open"),
        ({"num_frames": 40, "windows": Windows(length=33)}, "windows: got 33 frames, expected at most 32"),
        ({"height": 20}, "height: got 20, expected a multiple of 8: use 16"),
        ({"width": 17}, "width: got 17"),
        ({"num_inference_steps": 0}, "num_inference_steps: got 0"),
        ({"num_inference_steps": 1001}, "num_inference_steps: got 1001, expected at most 1000"),
        ({"guidance_scale": -2}, "guidance_scale: got -2"),
        ({"eta": 1.5}, "eta: got 1.5"),
        ({"num_videos_per_prompt": 0}, "num_videos_per_prompt: got 0"),
        ({"prompt": []}, "got an empty list"),
        ({"clip_skip": 3}, "clip_skip: got 3, expected 1 .the last layer. to 2"),
        ({"prompt": {0: "a", 2: "b"}}, "got a keyframe at 2, expected 0 to 1"),
        ({"negative_prompt": [{}]}, "got no keyframes"),
        ({"prompt": {"9": "a"}}, "got a keyframe at 9, expected 0 to 1"),
        ({"prompt": None}, "both or neither of prompt and prompt_embeds"),
        ({"negative_prompt": ["a", "b"]}, "negative_prompt: got 2 values for 1 prompt, expected 1"),
        ({"generator": [seeded(0), seeded(1)]}, "got 2 generators for 1 clips"),
        ({"latents": torch.zeros(1, 2, 4, 2, 2)}, r"shape \(1, 2, 4, 2, 2\), expected \(1, 4, 2, 2, 2\)"),
        ({"output_type": "gif"}, "got output_type 'gif', expected one of pil"),
        (
            {
                "prompt": None,
                "prompt_embeds": torch.zeros(1, 154, 40),
                "negative_prompt_embeds": torch.zeros(1, 77, 40),
            },
            "expected equal shapes",
        ),
        ({"negative_prompt": "a", "negative_prompt_embeds": torch.zeros(1, 77, 40)}, "both negative_prompt and"),
    ],
)
def test_mistakes_are_named(run, arguments, message):
    with pytest.raises(UserError, match=message):
        run(**arguments)


def test_from_config(nano, tmp_path):
    path = write_config(
        tmp_path / "two.yaml", entry(nano), entry(nano, H=24, motion_module=str(nano / "mm_v1.safetensors"))
    )
    loaded = AnimateDiff.from_config(path, entry=1, device="cpu", dtype="bfloat16", W=32)
    assert loaded.default_size == (24, 32) and loaded.model.dtype == torch.bfloat16
    assert loaded.model.unet.config.motion.version == "v1"
    frames = loaded(FOX, num_frames=2, num_inference_steps=1, output_type="pt").frames
    assert frames.shape == (1, 2, 3, 24, 32) and frames.isfinite().all() and frames.dtype == torch.float32
    assert loaded.to("cpu", torch.float32).model.dtype == torch.float32
    with pytest.raises(UserError, match="got entry 2, but .* has 2"):
        AnimateDiff.from_config(path, entry=2)
