"""What people hand to a call: numbers of every library, arrays, diffusers' arguments; and one line for all the rest."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from animatediff.checkpoints.identify import identify
from animatediff.checkpoints.load import load_base
from animatediff.checkpoints.textual_inversion import load_textual_inversion
from animatediff.config.networks import LCM, distilled_schedule, lightning
from animatediff.config.prompt_yaml import load_config
from animatediff.features.noise import seeded
from animatediff.models.tokenizer import Tokenizer
from animatediff.models.twins import share_weights
from animatediff.pipeline.headers import check_requests
from animatediff.pipeline.pipeline import AnimateDiffPipeline
from animatediff.pipeline.save import save_model
from animatediff.utils import UserError
from tests.checkpoints.synthetic import write
from tests.nano import entry, write_config

FOX = "a fox"
CALL = {"num_frames": 2, "height": 16, "width": 16, "num_inference_steps": 1, "output_type": "latent"}
PIXELS = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
ARRAY = PIXELS.permute(0, 2, 3, 1).numpy()


@pytest.fixture
def run(pipeline):
    def run(prompt=FOX, **arguments):
        seed = {} if "generator" in arguments else {"seed": 3}
        return pipeline(prompt, **seed | CALL | arguments).frames

    return run


@pytest.mark.parametrize(
    ("given", "plain"),
    [
        ({"guidance_scale": np.float64(3)}, {"guidance_scale": 3.0}),
        ({"guidance_scale": np.float32(3)}, {"guidance_scale": 3.0}),
        ({"num_inference_steps": np.int64(2)}, {"num_inference_steps": 2}),
        ({"num_inference_steps": torch.tensor(2)}, {"num_inference_steps": 2}),
        ({"eta": torch.tensor(0.5)}, {"eta": 0.5}),
        ({"timesteps": np.array([900])}, {"timesteps": [900]}),
        ({"timesteps": torch.tensor([900])}, {"timesteps": (900,)}),
        ({"freeinit": True}, {"freeinit": {"iterations": 3}}),
        ({"pag_layers": "up_blocks", "pag_scale": 1.0}, {"pag_layers": ["up_blocks"], "pag_scale": 1.0}),
        ({"generator": seeded(3)}, {"seed": 3}),
        ({"callback_on_step_end_tensor_inputs": ["latents"]}, {}),
        ({"video": (ARRAY * 255).round().astype(np.uint8)}, {"video": (PIXELS * 255).round().to(torch.uint8)}),
        ({"video": ARRAY}, {"video": (PIXELS * 255).round().to(torch.uint8)}),
        ({"image": (ARRAY[0] * 255).round().astype(np.uint8)}, {"image": (PIXELS[0] * 255).round().to(torch.uint8)}),
        ({"controlnet_images": None, "motion_scale": None}, {}),
    ],
)  # fmt: skip
def test_other_ways_to_say_it(run, given, plain):
    assert torch.equal(run(**given), run(**plain))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"foo": 1}, "unknown key 'foo'"),
        ({"foo": None}, "unknown argument 'foo'"),
        ({"height": 16.0}, "height: got 16.0, expected a whole number"),
        ({"num_frames": 6.0}, "num_frames: got 6.0, expected a whole number"),
        ({"guidance_scale": float("nan")}, "guidance_scale: got nan, expected a number"),
        ({"prompt": 5}, "prompt: got 5, expected text"),
        ({"prompt": [FOX, None]}, r"prompt\[1\]: got no value, expected text"),
        ({"generator": 5}, "generator: got 5, expected a torch.Generator"),
        ({"generator": [1]}, "generator: got a list of 1"),
        ({"seed": -5}, "seed: got -5, expected 0 to"),
        ({"seed": 5, "generator": seeded(5)}, "got both generator and seed"),
        ({"lora_model_path": "other"}, "lora_model_path: got a list of 1, but the networks are loaded already"),
        ({"motion_module": "other"}, "motion_module: got 'other', but the networks are loaded already"),
        ({"controlnet_path": "other"}, "controlnet_path: got 'other', but the networks are loaded already"),
        ({"decode_chunk_size": 0}, "decode_chunk_size: got 0, expected at least 1"),
        ({"decode_chunk_size": 2.5}, "decode_chunk_size: got 2.5"),
        ({"callback_on_step_end": 5}, "callback_on_step_end: got 5, expected a function"),
        ({"callback_on_step_end_tensor_inputs": ["prompt_embeds"]}, "callback_on_step_end_tensor_inputs: got"),
        ({"cross_attention_kwargs": {"gate": 1}}, r"cross_attention_kwargs: got \['gate'\], expected scale"),
        ({"output_type": 5}, "got output_type 5, expected one of pil"),
        ({"latents": 5}, "latents: got 5, expected a tensor"),
        ({"sigmas": ["a"], "num_inference_steps": None}, "sigmas: got a list of 1, expected a list of numbers"),
        ({"prompt": None, "prompt_embeds": "x"}, "prompt_embeds: got 'x', expected a tensor"),
        ({"prompt": None, "prompt_embeds": torch.zeros(77, 40)}, r"prompt_embeds: got shape \(77, 40\)"),
        ({"video": PIXELS}, r"video: got floats that are all 0 or more, expected \[-1, 1\]: give 2 \* x - 1"),
        ({"video": [None, None]}, "video: got a NoneType"),
        ({"video": 5}, "video: got 5, expected a file, pictures or a tensor"),
        ({"video": {}}, "video: got a mapping of 0"),
        ({"video": ARRAY * 2 - 1}, r"video: got an array of floats outside \[0, 1\]"),
        ({"num_inference_steps": 10**9}, "num_inference_steps: got 1000000000, expected at most 1000"),
    ],
)
def test_mistakes_are_one_line(run, arguments, message):
    with pytest.raises(UserError, match=message) as error:
        run(**arguments)
    assert "\n" not in str(error.value)


def test_files_of_the_pipeline_may_be_named_again(run, pipeline):
    assert torch.equal(run(motion_module=pipeline.request.model.motion_module), run())


def test_types_are_themselves_or_names(nano, tmp_path):
    config = write_config(tmp_path / "a.yaml", entry(nano))
    pipeline = AnimateDiffPipeline.from_config(config, dtype=torch.bfloat16)
    assert pipeline.dtype == torch.bfloat16 and pipeline.to(torch.float32).dtype == torch.float32


def test_outputs_by_every_name(pipeline):
    out = pipeline(FOX, seed=1, **CALL)
    assert out[0] is out.frames is out.videos is out["frames"] is out["videos"]
    assert (pipeline.device.type, pipeline.dtype) == ("cpu", torch.float32)
    assert pipeline.unet is pipeline.model.unet is pipeline.components.unet
    assert (pipeline.vae, pipeline.text_encoder) == (pipeline.model.vae, pipeline.model.text_encoder)


@pytest.mark.parametrize("length", [64, 77, 80, 154])
def test_a_negative_prompt_is_as_long_as_the_embeddings(run, length):
    embeds = torch.randn(1, length, 40, generator=torch.Generator().manual_seed(1))
    assert run(None, prompt_embeds=embeds, negative_prompt="bad").isfinite().all()


def test_a_clip_does_not_depend_on_its_batch_mates(run):
    size = {"height": 64, "width": 64}
    both = run([FOX, "very long " * 100], seed=[0, 1], **size)
    for i, prompt in enumerate((FOX, "very long " * 100)):
        alone = run(prompt, seed=i, **size)
        assert (both[i : i + 1] - alone).norm() < 1e-4 * alone.norm()


def test_loras_are_added_scaled_and_saved(nano, tmp_path):
    pipe = AnimateDiffPipeline.from_config(write_config(tmp_path / "run.yaml", entry(nano)), device="cpu")
    call = {"seed": 3, **CALL, "height": 64, "width": 64}  # smaller, and norms of single pixels blow rounding up
    plain = pipe(FOX, **call).frames
    name = pipe.load_lora(nano / "kohya.safetensors", 0.5)
    with_lora = pipe(FOX, **call).frames
    assert name == "kohya" and not torch.allclose(with_lora, plain, atol=1e-3)
    off = pipe(FOX, cross_attention_kwargs={"scale": 0.0}, **call).frames
    assert not torch.allclose(off, with_lora, atol=1e-3) and pipe.model.loras.scale("kohya") == 0.5
    saved = AnimateDiffPipeline.from_config(pipe.save(tmp_path / "saved") / "config.yaml", device="cpu")
    assert (saved(FOX, **call).frames - with_lora).norm() < 1e-3 * with_lora.norm()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file, which is a file, expected a folder"):
        pipe.save(tmp_path / "file")


@pytest.mark.parametrize(("distilled", "file"), [(lightning(4), "motion_module"), (LCM, "image_model")])
def test_a_distilled_model_is_saved_as_one(pipeline, tmp_path, distilled, file):
    schedule = distilled_schedule(pipeline.model.schedule, distilled)
    folder = save_model(replace(pipeline.model, distillation=distilled, schedule=schedule), tmp_path)
    (checked,) = check_requests(load_config(folder / "config.yaml").entries)
    facts = checked.headers.facts(checked.request)
    assert (facts.distillation, facts.schedule) == (distilled, schedule)
    assert {path.stem for path in folder.glob("*.safetensors") if identify(path).distillation} == {file}


def test_a_schedule_of_its_own_is_saved(nano, tmp_path):
    own = tmp_path / "own.yaml"
    own.write_text("noise_scheduler_kwargs: {beta_schedule: scaled_linear, beta_end: 0.014, clip_sample: true}")
    config = write_config(tmp_path / "run.yaml", entry(nano, inference_config=str(own), sampler="euler"))
    pipe = AnimateDiffPipeline.from_config(config, device="cpu")
    saved = AnimateDiffPipeline.from_config(pipe.save(tmp_path / "saved") / "config.yaml", device="cpu")
    assert saved.model.schedule == pipe.model.schedule and pipe.model.schedule.beta_end == 0.014
    kept = [(r.size.height, r.size.width, r.sampling.sampler) for r in (saved.request, pipe.request)]
    assert kept[0] == kept[1] and kept[0][0] == 16
    again = saved.save(tmp_path / "again")
    assert (again / "inference.yaml").read_text() == (tmp_path / "saved/inference.yaml").read_text()


def test_added_words_are_saved(pipeline, tmp_path):
    encoder, tokenizer = share_weights(pipeline.text_encoder), Tokenizer()
    file = write(tmp_path / "x.safetensors", {"<my-cat>": torch.randn(2, 40)})
    load_textual_inversion(file, encoder, tokenizer, name="Cat/1")
    folder = save_model(replace(pipeline.model, text_encoder=encoder, tokenizer=tokenizer), tmp_path / "saved")
    saved, taught = load_base(folder / "image_model.safetensors").text_encoder, Tokenizer()
    assert (saved.config.vocab_size, encoder.config.vocab_size) == (49408, 49410)
    (request,) = load_config(folder / "config.yaml").entries
    (word,) = request.model.embeddings
    load_textual_inversion(word.path, saved, taught, name=word.name)
    assert torch.equal(saved(taught(["a cat/1"])[0]), encoder(tokenizer(["a cat/1"])[0]))
