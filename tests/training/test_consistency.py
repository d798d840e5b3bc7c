"""Latent consistency distillation: the loss against a hand computation, and a training that is taken up."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from animatediff.checkpoints.files import read_state_dict
from animatediff.checkpoints.identify import identify
from animatediff.checkpoints.load import load_base
from animatediff.checkpoints.lora_files import read_lora
from animatediff.config.networks import LCM, ScheduleConfig
from animatediff.config.networks import consistency as consistency_needs
from animatediff.diffusion.schedule import NoiseSchedule
from animatediff.lab.stage_table import load_train_config
from animatediff.pipeline.pipeline import AnimateDiffPipeline
from animatediff.training import consistency
from animatediff.training.consistency import HUBER, ConsistencyStage, consistency_loss
from animatediff.utils import UserError
from tests.media.videos import write
from tests.nano import write_files


@pytest.mark.parametrize(("earlier", "end"), [(489, -1), (489, 249), (489, 489)])
def test_the_loss_is_that_of_a_hand_computation(earlier, end):
    """On single numbers: a student that takes half of what it sees for noise, and a teacher that takes a quarter."""
    schedule = NoiseSchedule(ScheduleConfig())
    x, t = 0.8, 499

    def jump(x: float, share: float, t: int, end: int) -> float:  # DDIM, arXiv 2010.02502, Eq. 12
        abar, there = (float(schedule.alphas_cumprod[n]) if n >= 0 else 1.0 for n in (t, end))
        return (
            math.sqrt(there) * (x - math.sqrt(1 - abar) * share * x) / math.sqrt(abar)
            + math.sqrt(1 - there) * share * x
        )

    moved = jump(x, 0.25, t, earlier)
    target = moved if earlier == end else jump(moved, 0.5, earlier, end)
    signal = math.sqrt(schedule.alphas_cumprod[end]) if end >= 0 else 1.0
    difference = (jump(x, 0.5, t, end) - target) / signal
    expected = math.sqrt(difference**2 + HUBER**2) - HUBER
    found = consistency_loss(
        lambda x, t: 0.5 * x,
        lambda x, t: 0.25 * x,
        schedule,
        torch.full((1, 1, 1, 1, 1), x, dtype=torch.float64),
        *(torch.tensor([n]) for n in (t, earlier, end)),
    )
    assert found.item() == pytest.approx(expected, rel=1e-4)  # as float32 keeps of a difference of 0.004


def test_timesteps_of_the_phases(monkeypatch):
    """Every timestep goes to the next one below, and its phase ends at the last of them that it has not passed."""
    seen = []

    def loss(student, teacher, schedule, x, t, earlier, end):
        seen.extend(zip(t.tolist(), earlier.tolist(), end.tolist(), strict=True))

    class Clips:
        empty = torch.zeros(77)

        def batch(self, index, batch_size, generator):
            return torch.zeros(batch_size, 1, 4, 2, 2), torch.zeros(batch_size, 77)

    monkeypatch.setattr(consistency, "consistency_loss", loss)
    stage = ConsistencyStage(
        "x", torch.nn.Linear(1, 1), lambda tokens: tokens, ScheduleConfig(), Clips(), trainable=None, save=None,
        guidance=(3.0, 3.0), timesteps=4, phases=2,
    )  # fmt: skip
    stage.loss(0, 100, torch.Generator().manual_seed(0))
    assert set(seen) == {(249, -1, -1), (499, 249, -1), (749, 499, 499), (999, 749, 499)}


def test_phases_that_do_not_fit_are_told(tmp_path):
    config = "configs/train/shapes_consistency.yaml"
    for values in (["timesteps=30"], ["timesteps=20", "phases=3"]):
        with pytest.raises(UserError, match="expected a divisor of 1000 and one of that: 100 and 1, or 20 and 4"):
            load_train_config(Path(config), values)


def test_values_that_this_loss_does_not_have_are_refused():
    config = Path("configs/train/shapes_consistency.yaml")
    for values, name in ((["loss.noise_offset=0.1"], "loss"), (["high_noise_fraction=0.5"], "high_noise_fraction")):
        with pytest.raises(UserError, match=f"got {name}, which the stage consistency has no use for: remove it"):
            load_train_config(config, values)


@pytest.mark.parametrize(
    ("phases", "sampled"), [(4, ("ddim", "trailing", 4, 1.0)), (1, ("lcm", "lcm", LCM.steps, 1.0))]
)
def test_samples_are_drawn_in_the_steps_that_are_trained_for(tmp_path, monkeypatch, phases, sampled):
    path = write_files(tmp_path) / "nano.safetensors"
    values = {"every": 1, "prompt": "a", "L": 1, "H": 32, "W": 32}
    seen, sample = [], AnimateDiffPipeline.sample

    def watched(self, request, **rest):
        seen.append(request.sampling)
        return sample(self, request, **rest)

    def sampler(**changes):
        samples = [f"samples.{name}={value}" for name, value in (values | changes).items()]
        config = load_train_config(Path("configs/train/shapes_consistency.yaml"), [f"phases={phases}", *samples])
        base = replace(load_base(path), schedule=ScheduleConfig())
        return config._sampler(base, path, torch.nn.Identity(), lambda line: None)

    monkeypatch.setattr(AnimateDiffPipeline, "sample", watched)
    sampler()(tmp_path, 1)
    assert [(s.sampler, s.timestep_spacing, s.steps, s.guidance_scale) for s in seen] == [sampled]
    with pytest.raises(UserError, match="^samples: .*guidance_scale: got 7.5, expected at most 2 with a LoRA of the"):
        sampler(guidance_scale=7.5)


@pytest.mark.slow
def test_a_training_that_is_taken_up(tmp_path, monkeypatch):
    """Bit by bit what one without a stop makes; a LoRA on image and motion layers; the teacher is without it."""
    files = write_files(tmp_path)
    write(tmp_path / "videos/a.mp4", frames=2, caption="a wall")
    data = {"video_folder": str(tmp_path / "videos"), "sample_size": 16, "sample_stride": 1, "sample_n_frames": 2}
    loop = {"steps": 2, "batch_size": 1, "learning_rate": 1e-3, "warmup_steps": 0, "schedule": "constant"}
    config = {"stage": "consistency", "rank": 2, "train_data": data, "num_workers": 0, "loop": loop}
    config |= {
        "pretrained_model_path": str(files / "nano.safetensors"),
        "motion_module": str(files / "mm_v2.safetensors"),
    }
    scales, call = [], ConsistencyStage.loss

    def watched(self, *rest):
        forward = self.unet.forward
        monkeypatch.setattr(self.unet, "forward", lambda *a: scales.append(self.trainable.scale) or forward(*a))
        return call(self, *rest)

    monkeypatch.setattr(ConsistencyStage, "loss", watched)
    for folder, steps in (("whole", 2), ("run", 1), ("run", 2)):
        path = tmp_path / "train.yaml"
        path.write_text(yaml.safe_dump(config | {"output_dir": str(tmp_path / folder)}))
        load_train_config(path, [f"loop.steps={steps}"]).run(lambda line: None)
    assert scales[:3] == [0.0, 1.0, 1.0]  # teacher; target and prediction
    whole, run = (tmp_path / name / "consistency_lora.safetensors" for name in ("whole", "run"))
    one, two = (read_state_dict(path).tensors for path in (whole, run))
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    assert any(tensor.abs().max() > 0 for key, tensor in one.items() if "lora_up" in key)
    assert identify(whole).distillation == consistency_needs(100, 1)
    targets = [entry.target for entry in read_lora(whole).entries]
    assert any("motion_modules" in target for target in targets) and any("attn2" in target for target in targets)
