"""PIA's and AnimateLCM-I2V's motion modules in another format keep what they have for a picture."""

import json

import pytest
import torch

from animatediff.checkpoints.files import read_state_dict
from animatediff.checkpoints.identify import identify
from animatediff.utils import UserError
from scripts import convert
from tests.checkpoints.synthetic import with_positional, write
from tests.families import conditioned_motion_tensors


def converted(monkeypatch, source, target, to):
    monkeypatch.setattr("sys.argv", ["convert.py", str(source), str(target), "--to", to])
    convert.main()
    return target


def test_pia_to_diffusers_and_back(tmp_path, monkeypatch):
    tensors = with_positional(conditioned_motion_tensors("pia"), 32)
    pia = write(tmp_path / "pia.safetensors", tensors)
    folder = converted(monkeypatch, pia, tmp_path / "adapter", "diffusers-motion")
    assert identify(folder).kind == "pia"
    assert json.loads((folder / "config.json").read_text())["conv_in_channels"] == 9
    back = converted(monkeypatch, folder, tmp_path / "back.ckpt", "official-motion")
    assert identify(back).kind == "pia"
    again = read_state_dict(back).tensors
    assert again.keys() == tensors.keys() and all(torch.equal(again[key], tensors[key]) for key in tensors)


def test_animatelcm_i2v_has_one_format(tmp_path, monkeypatch):
    tensors = conditioned_motion_tensors("animatelcm_i2v")
    i2v = write(tmp_path / "i2v.safetensors", tensors)
    pickled = converted(monkeypatch, i2v, tmp_path / "i2v.ckpt", "official-motion")
    assert identify(pickled).kind == "animatelcm-i2v" and read_state_dict(pickled).tensors.keys() == tensors.keys()
    with pytest.raises(UserError, match="MotionAdapter has no place for it; keep the official format"):
        converted(monkeypatch, i2v, tmp_path / "adapter", "diffusers-motion")
