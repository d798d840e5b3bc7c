"""ControlNet (arXiv 2302.05543): hints of what is where in each frame, as residuals of the skip connections."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from animatediff.checkpoints.controlnet_files import load_controlnet
from animatediff.checkpoints.load import ImageModel
from animatediff.config.condition_options import ControlNet as Options
from animatediff.config.keyframes import Keyframes
from animatediff.config.request import Request
from animatediff.diffusion.schedule import step_of
from animatediff.features.feature import FrameDenoise, Run
from animatediff.features.guide_pictures import read_pictures
from animatediff.features.inputs import prepare_inputs
from animatediff.features.windows import windows_of_step
from animatediff.media.preprocess import make_hint
from animatediff.models.controlnet_network import ControlNet, guess_weights
from animatediff.models.unet import UNet
from animatediff.utils import UserError, naming


@contextmanager
def controlnet(denoise: FrameDenoise, run: Run) -> Iterator[FrameDenoise]:
    """`controlnet`: one or several, whose residuals add up, also with SparseCtrl's."""
    if not run.request.controlnets.nets:
        yield denoise
        return
    controls = run.once("controlnets", lambda: make_controls(run))

    def controlled(x: Tensor, t: Tensor, frames: Tensor, **inputs: Any) -> Tensor:
        for control in controls:
            if (residuals := control(x, t, frames, run)) is not None:
                inputs |= _added(residuals, inputs)
        return denoise(x, t, frames, **inputs)

    yield controlled


def load(request: Request, headers: Any, image: ImageModel, unet: UNet) -> tuple[nn.ModuleList, str] | None:
    """All ControlNets of a request, and a line about them; None where there is none."""
    if not request.controlnets.nets:
        return None
    assert image.vae is not None
    nets, lines = nn.ModuleList(), []
    for i in range(len(request.controlnets.nets)):
        net, report = load_controlnet(headers.paths[f"controlnets.nets[{i}].path"], image.unet, image.vae)
        nets.append(net)
        lines.append(str(report))
    return nets, "\n".join(lines)


def make_controls(run: Run) -> list[Control]:
    """The controls of a clip, from its hints. Raises: UserError where they cannot be read."""
    controls = []
    for i, (net, options) in enumerate(
        zip(run.model.networks["controlnets"], run.request.controlnets.nets, strict=True)
    ):
        with naming(f"controlnet[{i}]"):
            hints, rows = read_hints(options, run.request)
        controls.append(Control(net, net.embed(hints.to(run.model.device, run.model.dtype)), rows, options))
    return controls


def read_hints(options: Options, request: Request) -> tuple[Tensor, list[int]]:
    """Hints (n, 3, H, W) in [0, 1], -1 where to paint anew, and which of them each frame of the clip has, -1 for none.

    Raises:
        UserError: a file cannot be read, or there are neither one nor as many as frames.
    """
    size = request.size
    frames, height, width = size.num_frames, size.height, size.width
    mask = None
    if options.preprocessor == "inpaint" or not len(options.images):
        given = prepare_inputs(request.inputs, frames=frames, height=height, width=width, window=frames + 1)
        assert given is not None and given.video is not None
        mask = given.mask
        if not len(options.images):
            video = ((given.video[0] + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
            pictures: dict[int, Image.Image] = dict(enumerate(map(Image.fromarray, video)))
    if len(options.images):
        pictures = read_pictures(options.images, most=frames, beside=request.inputs)
    keyed = isinstance(options.images, dict)
    if not keyed and len(pictures) not in (1, frames):
        raise UserError(f"images: got {len(pictures)} hints for {frames} frames, expected one for all, or {frames}")
    how = "none" if options.preprocessor == "inpaint" else options.preprocessor
    made = [make_hint(picture, height, width, how=how, **options.settings) for picture in pictures.values()]
    hints = torch.from_numpy(np.stack(made)).permute(0, 3, 1, 2) / 255
    rows = [-1] * frames
    for row, frame in enumerate(pictures):
        rows[frame] = row
    rows = rows if keyed else [0] * frames if len(pictures) == 1 else rows
    if options.preprocessor == "inpaint":
        assert mask is not None
        rows_of_mask = mask[0].expand(frames, -1, -1, -1)
        hints = hints.expand(frames, -1, -1, -1)[rows].masked_fill(rows_of_mask, -1.0)
        rows = list(range(frames))
    return hints, rows


class Control:
    """What one ControlNet adds to the network for a clip.

    A frame's residuals depend on the frame alone, so that windows share those of frames that they have in common.

    Args:
        net: on its device, in its dtype.
        embedded: its hints (n, c, h, w), see `ControlNet.embed`.
        rows: the hint of each frame of the clip, -1 for none.
    """

    def __init__(self, net: ControlNet, embedded: Tensor, rows: Sequence[int], options: Options):
        self.net, self.embedded, self.rows = net, embedded, list(rows)
        self.scale, self.start, self.end = Keyframes.read(options.scale), options.start, options.end
        self.guess_mode = options.guess_mode
        self._cache: dict[int, tuple[float, Tensor, list[Tensor]]] = {}
        self._uses: Counter[int] = Counter()

    @property
    def _conditional_alone(self) -> bool:
        """Whether the unconditional part has no residuals."""
        return self.guess_mode or self.net.config.pooled

    def __call__(self, x: Tensor, t: Tensor, frames: Tensor, run: Run) -> list[Tensor] | None:
        """Scaled residuals ((n b w), c, h, w), the middle block's last; None where there are none.

        Args: as of `FrameDenoise`.
        """
        if self._conditional_alone and run.parts == ("unconditional",):
            return None
        step, steps = step_of(run.timesteps, t), len(run.timesteps)
        numbers = frames.tolist()
        scales = [self.scale.at(frame, run.progress(t)) * (self.rows[frame] >= 0) for frame in numbers]
        if not active(self.start, self.end, step, steps) or not any(scales):
            return None
        used = [i for i, scale in enumerate(scales) if scale]
        missing = [i for i in used if not self._is_known(numbers[i], x[:, i], t)]
        if missing:
            self._compute(x[:, missing], t, frames[missing], run)
            self._count_uses(run, step, [numbers[i] for i in missing])
        known = [self._cache[numbers[i]][2] for i in used]
        factor = torch.tensor(scales, device=x.device)[None, :, None, None, None]
        residuals = []
        for parts in zip(*known, strict=True):
            out = parts[0].new_zeros(len(x), len(numbers), *parts[0].shape[1:])
            out[:, used] = torch.stack(parts, dim=1)
            residuals.append((out * factor.to(out)).flatten(0, 1))
        self._forget([numbers[i] for i in used])
        return residuals

    def _compute(self, x: Tensor, t: Tensor, frames: Tensor, run: Run) -> None:
        """Residuals of some frames for all parts of the batch; a perturbed part has the conditional one's."""
        parts = ["conditional" if part == "perturbed" else part for part in run.parts]
        one_half = self._conditional_alone
        needed = [part for part in dict.fromkeys(parts) if part == "conditional" or not one_half]
        chosen = [parts.index(part) for part in needed]

        def of_chosen(rows: Tensor) -> Tensor:
            return rows.unflatten(0, (len(parts), -1))[chosen].flatten(0, 1)

        embedded = self.embedded[[self.rows[frame] for frame in frames.tolist()]]
        added = {name: of_chosen(rows) for name, rows in run.added(frames).items()}
        inputs = (of_chosen(x).to(embedded.dtype), of_chosen(t), of_chosen(run.text(frames)), embedded)
        down, mid = self.net(*inputs, **added)
        weights = guess_weights(len(down) + 1) if self.guess_mode else [1.0] * (len(down) + 1)
        of_frames: list[list[Tensor]] = [[] for _ in frames]
        for residual, weight in zip([*down, mid], weights, strict=True):
            found = dict(zip(needed, residual.unflatten(0, (len(needed), -1, len(frames))), strict=True))
            nothing = torch.zeros_like(next(iter(found.values())))
            whole = weight * torch.cat([found.get(part, nothing) for part in parts])
            for rows, of_frame in zip(of_frames, whole.unbind(1), strict=True):
                rows.append(of_frame)
        for i, frame in enumerate(frames.tolist()):
            self._cache[frame] = (float(t[0]), x[:, i], of_frames[i])

    def _is_known(self, frame: int, x: Tensor, t: Tensor) -> bool:
        if frame not in self._cache:
            return False
        timestep, latents, _ = self._cache[frame]
        return timestep == float(t[0]) and torch.equal(latents, x)

    def _count_uses(self, run: Run, step: int, frames: Sequence[int]) -> None:
        """How many windows of this step see these frames, so that their residuals can go after the last."""
        windows, counts = run.request.windows, Counter[int]()
        if windows is not None:
            for window in windows_of_step(windows, step, run.request.size.num_frames):
                counts.update(window)
        for frame in frames:
            self._uses[frame] = counts[frame]

    def _forget(self, frames: Sequence[int]) -> None:
        for frame in frames:
            self._uses[frame] -= 1
            if self._uses[frame] <= 0:
                del self._cache[frame]


def active(start: float, end: float, step: int, steps: int) -> bool:
    """Whether a step (from 0) lies within parts of the sampling; diffusers' rule."""
    return step / steps >= start - 1e-9 and (step + 1) / steps <= end + 1e-9


def _added(residuals: list[Tensor], inputs: dict[str, Any]) -> dict[str, Any]:
    """As arguments of `UNet.forward`, added to those that are there."""
    if (there := inputs.get("down_residuals")) is not None:
        residuals = [a + b for a, b in zip(residuals, [*there, inputs["mid_residual"]], strict=True)]
    return {"down_residuals": residuals[:-1], "mid_residual": residuals[-1]}
