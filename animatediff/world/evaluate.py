"""Measures a text-to-video model on Shapes, the toy data set: captions in, percentages out."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from animatediff.media.pictures import write_picture
from animatediff.metrics.tables import contact_sheet, write_csv
from animatediff.utils import UserError
from animatediff.world.camera import CAMERA
from animatediff.world.read import Score, score_clip
from animatediff.world.read_camera import camera_amplitudes, read_camera
from animatediff.world.read_styles import beneath, has_watermark, read_style
from animatediff.world.report import LOOKS, captioned, csv_row, summarise
from animatediff.world.series import World
from animatediff.world.shapes import MOTIONS, Scene

Generate = Callable[[list[str], list[int]], Tensor]
HELD_OUT_SEED = 1  # of the scenes; training draws from seed 0


def evaluate_shapes(
    generate: Generate,
    *,
    captions: int = 200,
    seed: int = HELD_OUT_SEED,
    batch: int = 8,
    style: str = "plain",
    motions: Sequence[str] = tuple(MOTIONS),
    output_dir: Path | None = None,
    settings: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Animate captions that ask for some motions in turn, and read the clips back.

    Args:
        generate: (captions, noise seeds) -> clips (n, 16, 3, 64, 64) in [-1, 1].
        captions: how many.
        seed: of the series of scenes; clip i has the noise seed i.
        batch: captions to a call of `generate`.
        style: the key of STYLES that the model paints in; labels are read from what is beneath it.
        motions: that the captions ask for in turn, keys of MOTIONS or CAMERA.
        output_dir: gets `summary.json`, `clips.csv` (a row per clip) and `sheet.png` (the first clip of every motion).
        settings: what made the clips, for `summary.json`.

    Returns:
        `settings`, and `summarise` of the `generated` clips, of the same clips with their frames `shuffled` (motion
        must come out at chance), and of the `rendered` clips of the same scenes (what a perfect model reaches);
        generated and rendered ones also have `style`, percent in that style, and `watermark`, percent under one;
        generated ones have `difference`, the mean absolute difference from the rendered ones, pixels in [-1, 1]: of
        every frame under its number, and of `all`.

    Raises:
        UserError: fewer than one caption or one to a batch, other clips, an unknown style or motion.
    """
    if captions < 1 or batch < 1:
        raise UserError(f"got {captions} captions in batches of {batch}, expected at least one of each")
    world = World(captions, style=style, motions=tuple(motions), seed=seed)
    scenes = [world.scene(i) for i in range(captions)]
    camera = any(scene.motion in CAMERA for scene in scenes)

    def score(clip: Tensor, scene: Scene) -> Score:
        plain = beneath(clip, style)
        found = score_clip(plain)
        if camera:
            found = replace(found, amplitudes=found.amplitudes | camera_amplitudes(plain))
        return replace(found, motion=read_camera(plain)) if scene.motion in CAMERA else found

    scores: dict[str, list[Score]] = {"generated": [], "shuffled": [], "rendered": []}
    looks: dict[str, list[dict[str, bool]]] = {"generated": [], "rendered": []}
    differences: list[Tensor] = []
    shown: list[Tensor] = []
    with tqdm(total=captions, desc="captions", unit="clip") as bar:
        for start in range(0, captions, batch):
            part = scenes[start : start + batch]
            videos = generate([scene.caption for scene in part], list(range(start, start + len(part)))).float().cpu()
            if len(videos) != len(part):
                raise UserError(f"got {len(videos)} clips for {len(part)} captions, expected one for each")
            clips = {"generated": videos, "rendered": world.render(range(start, start + len(part)))[0]}
            for name, found in (clips | {"shuffled": shuffle_frames(videos, first_seed=start)}).items():
                scores[name] += [score(clip, scene) for clip, scene in zip(found, part, strict=True)]
            for name, found in clips.items():
                looks[name] += [
                    {"style": read_style(clip) == style, "watermark": has_watermark(clip)} for clip in found
                ]
            differences.append((videos - clips["rendered"]).abs().mean(dim=(2, 3, 4)))
            shown += videos[: max(len(world.motions) - start, 0)].clamp(-1, 1)
            bar.update(len(part))
    summary = {name: summarise(found, scenes) for name, found in scores.items()}
    for name, found in looks.items():
        summary[name] |= {key: 100 * sum(look[key] for look in found) / captions for key in LOOKS}
    frames = torch.cat(differences).mean(dim=0)
    mean = {"all": frames.mean()} | {str(number): value for number, value in enumerate(frames)}
    summary["generated"]["difference"] = {key: round(float(value), 4) for key, value in mean.items()}
    result = {
        "settings": {"captions": captions, "seed": seed, "style": style, **(settings or {})},
        **summary,
    }
    if output_dir is not None:
        _write(Path(output_dir), result, scenes, scores, shown)
    return result


def shuffle_frames(videos: Tensor, *, first_seed: int = 0) -> Tensor:
    """Clips (n, f, ...) with the frames of clip i in an order drawn from seed `first_seed + i`."""
    orders = [
        torch.randperm(videos.shape[1], generator=torch.Generator().manual_seed(first_seed + i))
        for i in range(len(videos))
    ]
    return torch.stack([video[order] for video, order in zip(videos, orders, strict=True)])


def _write(
    folder: Path, result: dict[str, Any], scenes: list[Scene], scores: dict[str, list[Score]], shown: list[Tensor]
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "summary.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    rows = [
        csv_row(i, scene, score) | {"read_motion_shuffled": shuffled.motion}
        for i, (scene, score, shuffled) in enumerate(zip(scenes, scores["generated"], scores["shuffled"], strict=True))
    ]
    write_csv(folder / "clips.csv", rows)
    sheet = contact_sheet([captioned(*row) for row in zip(shown, scenes, scores["generated"], strict=False)])
    write_picture(sheet, folder / "sheet.png")
