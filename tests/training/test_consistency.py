"""Latent consistency distillation: the loss against a hand computation, and a training that is taken up."""

import math

import pytest
import torch
import yaml

from animatediff.checkpoints.files import read_state_dict
from animatediff.checkpoints.lora_files import read_lora
from animatediff.config.networks import ScheduleConfig
from animatediff.diffusion.schedule import NoiseSchedule
from animatediff.lab.stage_table import load_train_config
from animatediff.training.consistency import HUBER, ConsistencyStage, consistency_function, consistency_loss
from tests.media.videos import write
from tests.nano import write_files


def test_the_loss_is_that_of_a_hand_computation():
    """On single numbers: a student that takes half of what it sees for noise, and a teacher that takes a quarter."""
    schedule = NoiseSchedule(ScheduleConfig())
    x, t, earlier = 0.8, 499, 489
    signal, sigma = (math.sqrt(schedule.alphas_cumprod[t]), math.sqrt(1 - schedule.alphas_cumprod[t]))
    signal2, sigma2 = (math.sqrt(schedule.alphas_cumprod[earlier]), math.sqrt(1 - schedule.alphas_cumprod[earlier]))
    moved = signal2 * (x - sigma * 0.25 * x) / signal + sigma2 * 0.25 * x  # DDIM, arXiv 2010.02502, Eq. 12

    def jump(x: float, t: int, signal: float, sigma: float) -> float:
        c_skip, c_out = 0.25 / ((10 * t) ** 2 + 0.25), 10 * t / math.sqrt((10 * t) ** 2 + 0.25)
        return c_skip * x + c_out * (x - sigma * 0.5 * x) / signal

    difference = jump(x, t, signal, sigma) - jump(moved, earlier, signal2, sigma2)
    expected = math.sqrt(difference**2 + HUBER**2) - HUBER
    found = consistency_loss(
        lambda x, t: 0.5 * x,
        lambda x, t: 0.25 * x,
        schedule,
        torch.full((1, 1, 1, 1, 1), x, dtype=torch.float64),
        torch.tensor([t]),
        torch.tensor([earlier]),
    )
    assert found.item() == pytest.approx(expected, rel=1e-5)  # the schedule is float32


def test_at_timestep_0_nothing_is_changed():
    x = torch.randn(2, 1, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    found = consistency_function(lambda x, t: 7 * x, NoiseSchedule(ScheduleConfig()), x, torch.tensor([0, 500]))
    assert torch.equal(found[0], x[0]) and not torch.allclose(found[1], x[1])


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
    targets = [entry.target for entry in read_lora(whole).entries]
    assert any("motion_modules" in target for target in targets) and any("attn2" in target for target in targets)
