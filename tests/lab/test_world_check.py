"""The checks before a motion training see what the bundled image model draws, and what its features hold."""

from importlib.resources import files

import pytest

from animatediff.checkpoints.load import ImageModel, load_base
from animatediff.lab import world_check
from animatediff.lab.world_check import direction_in_features, hint_accuracy


@pytest.fixture(scope="module")
def model() -> ImageModel:
    return load_base(str(files("animatediff") / "assets" / "shapes.safetensors"))


def test_hints_are_read_from_drawn_frames(model):
    found = hint_accuracy(model, captions=6, motions=("left", "right", "up"), steps=8)
    assert list(found) == ["all", "left", "right", "up"] and found["all"] >= 100 * 5 / 6 - 0.1, found


@pytest.mark.slow
def test_the_direction_is_in_the_features(model, monkeypatch):
    """Without noise it can be seen."""
    monkeypatch.setattr(world_check, "PROBED_TIMESTEP", 0)
    assert direction_in_features(model, clips=16, frames=4, captioned=False) >= 90
