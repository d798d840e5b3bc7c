"""Both stages on a network of a few thousand weights: they learn, stop, go on, freeze and export as they should."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from animatediff.checkpoints.files import read_state_dict
from animatediff.checkpoints.load import load_base, load_motion_module, load_vae
from animatediff.config.prompt_yaml import BUNDLED
from animatediff.lab.stage_table import load_train_config
from animatediff.lab.world_image import ShapesDecoder
from animatediff.lab.world_vae import DecoderStage
from animatediff.training.distributed import shared_loss
from animatediff.training.latents import OVERSAMPLING, LatentClips
from animatediff.training.loop import LoopConfig, step_gradients
from animatediff.utils import UserError
from animatediff.world.series import World
from animatediff.world.shapes import make_scene
from scripts.train import run
from tests.training.line import Rows
from tests.training.two_processes import HALVES, train_looked_at, two_processes

LOOP = {"steps": 3, "batch_size": 2, "learning_rate": 1e-3, "warmup_steps": 1, "checkpoint_every": 2, "log_every": 1}
IMAGE = {
    "stage": "shapes_image",
    "clips": 4,
    "vae": {"block_out_channels": [4, 4, 8], "layers_per_block": 1, "norm_num_groups": 2},
    "unet": {
        "block_out_channels": [8, 16],
        "attention_levels": [False, True],
        "layers_per_block": 1,
        "context_dim": 8,
        "num_heads": 2,
        "norm_num_groups": 4,
    },
    "text": {"width": 8, "layers": 1, "num_heads": 2, "mlp_width": 16},
    "autoencoder": LOOP,
    "image": LOOP,
}
MOTION = {
    "stage": "motion_module",
    "world": {"clips": 4},
    "noisy_share": 0.5,
    "motion": {"version": "v2", "mid_block": True, "num_heads": 2, "resolutions": [2]},
    "loop": LOOP,
}


def write(path: Path, values: dict) -> Path:
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("train")
    image = write(folder / "image.yaml", IMAGE | {"output_dir": str(folder / "image")})
    changes = {"output_dir": str(folder / "motion"), "pretrained_model_path": str(folder / "image/image.safetensors")}
    motion = write(folder / "motion.yaml", MOTION | changes)
    run(["--config", str(image), "--config", str(motion), "--device", "cpu"], lambda line: None)
    return folder


def test_exports_load_as_any_other_file(trained):
    base = load_base(trained / "image/image.safetensors")
    assert base.vae is not None and base.unet.config.block_out_channels == (8, 16)
    unet, report = load_motion_module(base.unet, trained / "motion/motion.safetensors")
    assert unet.config.motion.version == "v2" and unet.config.motion.resolutions == (2,)
    assert any(p.abs().max() > 0 for n, p in unet.motion_parameters() if "proj_out" in n)


def test_both_stages_go_on_from_files(trained, tmp_path):
    image, motion = trained / "image/image.safetensors", trained / "motion/motion.safetensors"
    unlearnt = LOOP | {"learning_rate": 1e-12, "weight_decay": 0.0, "steps": 1}
    changes = {"output_dir": str(tmp_path / "image"), "init_from": str(image), "image": unlearnt}
    load_train_config(write(tmp_path / "image.yaml", IMAGE | changes)).run(lambda line: None)
    changes = {
        "output_dir": str(tmp_path),
        "pretrained_model_path": str(image),
        "init_from": str(motion),
        "loop": unlearnt,
    }
    load_train_config(write(tmp_path / "motion.yaml", MOTION | changes)).run(lambda line: None)
    for before, after in ((image, tmp_path / "image/image.safetensors"), (motion, tmp_path / "motion.safetensors")):
        old, new = read_state_dict(before).tensors, read_state_dict(after).tensors
        assert old.keys() == new.keys() and all(torch.allclose(old[k], new[k], atol=1e-4) for k in old)


def test_a_decoder_learns_other_looks_and_the_latents_stay(trained, tmp_path):
    image = trained / "image/image.safetensors"
    lora = {
        "stage": "image_lora",
        "pretrained_model_path": str(image),
        "world": {"clips": 2, "style": "neon"},
        "rank": 2,
    }
    painter = lora | {"loop": LOOP, "output_dir": str(tmp_path / "lora")}
    load_train_config(write(tmp_path / "lora.yaml", painter)).run(lambda line: None)
    decoder = {"stage": "shapes_decoder", "pretrained_model_path": str(image), "output_dir": str(tmp_path)}
    loras = {"loras": {"neon": str(tmp_path / "lora/lora.safetensors")}}
    said: list[str] = []
    load_train_config(write(tmp_path / "decoder.yaml", decoder | loras | {"loop": LOOP})).run(said.append)
    assert any("lora" in line for line in said)
    old, new = load_base(image), load_base(tmp_path / "image.safetensors")
    for name, tensor in old.vae.state_dict().items():
        learnt = name.startswith(("decoder.", "post_quant_conv."))
        assert learnt or torch.equal(new.vae.state_dict()[name], tensor), name
    assert not torch.equal(new.vae.decoder.conv_in.weight, old.vae.decoder.conv_in.weight)
    assert all(torch.equal(a, b) for a, b in zip(old.unet.parameters(), new.unet.parameters(), strict=True))
    alone, _ = load_vae(tmp_path / "vae.safetensors", old)
    assert alone.config == old.vae.config
    assert all(torch.equal(a, b) for a, b in zip(alone.parameters(), new.vae.parameters(), strict=True))


def test_half_of_a_decoders_latents_are_predicted_in_the_looks_that_models_paint_in(trained):
    model = load_base(trained / "image/image.safetensors")
    n, scale = 90, model.vae.config.scaling_factor
    painter = replace(model, unet=lambda x, t, context: torch.full_like(x, 7 * scale))
    styles = ("plain", "neon", "hatched")
    stage = DecoderStage(model, {"neon": painter}, styles=styles, watermarks=False)
    stage.schedule.clean_and_noise = lambda prediction, x, t: (prediction, x)
    latents, looks = torch.zeros(n, 4, 2, 2), [*styles[:2], ""] * (n // 3)
    given = stage.given(latents, ["a"] * n, looks, torch.Generator().manual_seed(0)).flatten(1)
    changed = {look: given[[own == look for own in looks]].abs().sum(dim=1) > 0 for look in set(looks)}
    assert not changed[""].any()
    for look in styles[:2]:
        assert 0 < changed[look].sum() < 30
    neon = given[[own == "neon" for own in looks]]
    assert set(neon.unique().tolist()) == {0.0, 7.0}
    with pytest.raises(UserError, match="loras: got 'plain', expected styles other than plain"):
        ShapesDecoder(output_dir="a", pretrained_model_path="b", loop=LoopConfig(**LOOP), loras={"plain": "c"})


def test_the_number_of_processes_does_not_change_the_result(trained, tmp_path):
    """Two micro-batches a step, one after the other or shared by two processes; what both have to say, one says."""
    twice = LOOP | {"micro_batches": 2}
    given = {"pretrained_model_path": str(trained / "image/image.safetensors"), "loop": twice}
    load_train_config(write(tmp_path / "a.yaml", MOTION | given | {"output_dir": str(tmp_path / "one")})).run(print)
    config = write(tmp_path / "b.yaml", MOTION | given | {"output_dir": str(tmp_path / "two")})
    two_processes(lambda: train_looked_at(tmp_path, config), tmp_path)
    one, two = (torch.load(tmp_path / name / "state.pt", weights_only=True) for name in ("one", "two"))
    assert one["step"] == two["step"] == 3
    assert all(torch.allclose(one["model"][k], two["model"][k], atol=1e-5) for k in one["model"])
    lines, errors = [
        "".join((tmp_path / f"{name}{rank}.txt").read_text() for rank in (0, 1)).splitlines()
        for name in ("output", "errors")
    ]
    assert lines.count("both say so") == sum("motion_module 3/3" in line for line in lines) == 1
    assert sum("b.yaml: seed: got 'one'" in line for line in errors) == 1
    messages = [(tmp_path / f"message{rank}.txt").read_text() for rank in (0, 1)]
    assert messages[0] == messages[1] and "got loss nan at step 0 of line (the batch: row4, row5" in messages[0]
    whole, halves = Rows(), Rows()
    for stage, config in ((whole, replace(HALVES, batch_size=8, micro_batches=1)), (halves, HALVES)):
        step_gradients(shared_loss(stage, torch.nn.ParameterList(stage.net.parameters())), config, step=0)
    expected = [p.grad for p in whole.net.parameters()]
    for found in (
        [p.grad for p in halves.net.parameters()],
        *(torch.load(tmp_path / f"gradients{rank}.pt", weights_only=True) for rank in (0, 1)),
    ):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_the_motion_module_learns_what_its_image_model_predicts(trained, tmp_path):
    """v-prediction is written into the image model's file, and the next stage trains towards it."""
    changes = {"output_dir": str(tmp_path / "image"), "prediction_type": "v_prediction"}
    changes["init_from"] = str(trained / "image/image.safetensors")
    load_train_config(write(tmp_path / "image.yaml", IMAGE | changes)).run(lambda line: None)
    base = load_base(tmp_path / "image/image.safetensors")
    assert base.schedule.prediction_type == "v_prediction"
    motion = {
        "output_dir": str(tmp_path / "motion"),
        "pretrained_model_path": str(tmp_path / "image/image.safetensors"),
    }
    load_train_config(write(tmp_path / "motion.yaml", MOTION | motion)).run(lambda line: None)
    plain, v = (json.loads((f / "motion/log.jsonl").read_text().splitlines()[0]) for f in (trained, tmp_path))
    assert plain["loss"] != v["loss"]


def test_a_start_of_other_sizes_is_refused(trained, tmp_path):
    changes = {"output_dir": str(tmp_path), "init_from": str(trained / "image/image.safetensors")}
    other = IMAGE | {"text": IMAGE["text"] | {"layers": 2}} | changes
    with pytest.raises(UserError, match="give the file's sizes in the config"):
        load_train_config(write(tmp_path / "image.yaml", other)).run(lambda line: None)


def test_the_log_has_a_line_per_step(trained):
    lines = [json.loads(line) for line in (trained / "motion/log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]


def test_words_the_world_never_says_stay_zero(trained):
    table = load_base(trained / "image/image.safetensors").text_encoder.state_dict()[
        "text_model.embeddings.token_embedding.weight"
    ]
    assert 5 < (table.abs().sum(1) > 0).sum() < 200


def test_the_image_stage_s_latents_serve_the_motion_stage_too(trained):
    assert (trained / "image/clips.pt").exists() and not (trained / "motion/clips.pt").exists()


def test_oversampled_motions_are_drawn_more_often(trained):
    motions = [make_scene(i).motion for i in range(4)]
    file, vae = trained / "image/clips.pt", load_base(trained / "image/image.safetensors").vae
    clips = LatentClips.of_world(file, vae, World(4, oversampled=(motions[0],)))
    wanted = torch.tensor([OVERSAMPLING if motion == motions[0] else 1.0 for motion in motions])
    drawn = clips.draw(2000, torch.Generator().manual_seed(0)).bincount(minlength=4) / 2000
    assert wanted.min() < wanted.max() and torch.allclose(drawn, wanted / wanted.sum(), atol=0.04)


def test_an_oversampled_motion_that_does_not_exist_is_refused(tmp_path):
    path = write(tmp_path / "image.yaml", IMAGE | {"output_dir": str(tmp_path / "out"), "oversampled": ["spin"]})
    with pytest.raises(UserError, match="oversampled: got 'spin', expected motions of the data set: still"):
        load_train_config(path).run(lambda line: None)


def test_latents_are_normalised(trained):
    latents = torch.load(trained / "image/clips.pt", weights_only=True)["latents"].float()
    assert latents.mean().abs() < 0.3 and 0.7 < latents.std() < 1.4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stage": "shapes"}, "got stage 'shapes', expected one of"),
        ({"clip": 3}, "unknown key 'clip', the nearest known one is 'clips'"),
        ({"steps": 3}, "unknown key 'steps', expected it in .* or image"),
        ({"clips": "many"}, "clips: got 'many', expected a whole number"),
        ({"image": LOOP | {"steps": 0}}, "bad.yaml: image.steps: got 0, expected at least 1"),
    ],
)
def test_bad_configs(tmp_path, change, message):
    path = write(tmp_path / "bad.yaml", IMAGE | {"output_dir": "x"} | change)
    with pytest.raises(UserError, match=message):
        load_train_config(path)


def test_a_prompt_config_is_named():
    with pytest.raises(UserError, match="a list of 1, expected a training config, .*read by scripts/animate.py"):
        load_train_config(BUNDLED)
