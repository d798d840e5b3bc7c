"""What the metadata of a file say, which are strings: typed, and bounded."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from animatediff.config.networks import ScheduleConfig
from animatediff.diffusion.schedule import SPACINGS
from animatediff.utils import UserError

# Entries of a single file that are no weights but tell how it was trained -> metadata.
MARKERS = {"v_pred": {"prediction_type": "v_prediction"}, "ztsnr": {"rescale_betas_zero_snr": "true"}}
Metadata = Mapping[str, str]
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


def motion_norm_groups(metadata: Metadata) -> int:
    """Groups of a motion module's GroupNorm; they are those of the UNet it was trained in."""
    return integer(metadata, "norm_num_groups", 32)


def marked(keys: Iterable[str], metadata: Metadata) -> dict[str, str]:
    """The metadata, with what marker entries among the keys say where the metadata themselves say nothing."""
    told: dict[str, str] = {}
    for key in MARKERS.keys() & set(keys):
        told |= MARKERS[key]
    return told | dict(metadata)


def prediction_type(metadata: Metadata) -> str | None:
    """What the UNet predicts, where the metadata says so, ours or those of the model spec (modelspec.org)."""
    if "prediction_type" not in metadata and (told := metadata.get("modelspec.prediction_type")):
        metadata = {"prediction_type": {"v": "v_prediction", "v-prediction": "v_prediction"}.get(told, told)}
    return choice(metadata, "prediction_type", PREDICTION_TYPES)


def schedule_facts(metadata: Metadata) -> dict[str, Any]:
    """What an image model's file says of its schedule, as arguments of ScheduleConfig; not betas, a motion module's."""
    facts = {
        "prediction_type": prediction_type(metadata),
        "timestep_spacing": choice(metadata, "timestep_spacing", SPACINGS),
    }
    if choice(metadata, "rescale_betas_zero_snr", ("true", "false")) == "true":
        facts["rescale_betas_zero_snr"] = True
    return {name: value for name, value in facts.items() if value is not None}


def schedule_metadata(schedule: ScheduleConfig) -> dict[str, str]:
    """What `schedule_facts` reads of this schedule."""
    told = {"prediction_type": schedule.prediction_type}
    if schedule.timestep_spacing != ScheduleConfig.timestep_spacing:
        told["timestep_spacing"] = schedule.timestep_spacing
    return told | ({"rescale_betas_zero_snr": "true"} if schedule.rescale_betas_zero_snr else {})


def consistency_facts(metadata: Metadata) -> tuple[int, int] | None:
    """Timesteps and phases that a LoRA of the training stage `consistency` was distilled on; None of any other."""
    try:
        told = json.loads(metadata["consistency"])
        timesteps, phases = int(told["timesteps"]), int(told["phases"])
    except (KeyError, TypeError, ValueError, RecursionError, OverflowError):
        return None
    return (timesteps, phases) if 0 < phases <= timesteps <= 1000 else None


def choice(metadata: Metadata, name: str, choices: tuple[str, ...]) -> str | None:
    value = metadata.get(name)
    if value is not None and value not in choices:
        raise UserError(f"got {name} {value[:80]!r} in the metadata, expected one of {', '.join(choices)}")
    return value


def integer(metadata: Metadata, name: str, default: int, *, least: int = 1) -> int:
    text = metadata.get(name, str(default))
    if not text.isdecimal() or len(text) > 6 or int(text) < least:
        raise UserError(f"got {name} {text[:80]!r} in the metadata, expected a whole number from {least} to 999999")
    return int(text)


def number(metadata: Metadata, name: str, default: float) -> float:
    text = metadata.get(name, str(default))
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 1e-6 < value < 1e6:
        raise UserError(f"got {name} {text[:80]!r} in the metadata, expected a positive number, e.g. {default}")
    return value
