"""CameraCtrl (arXiv 2404.02101): a camera that follows a file of poses, or makes a move."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from animatediff.checkpoints.cameractrl_files import load_cameractrl
from animatediff.checkpoints.known_files import find_file, missing_file
from animatediff.checkpoints.load import ImageModel
from animatediff.config.request import Request
from animatediff.features.feature import FrameDenoise, Run
from animatediff.media.camera_poses import CameraPath, move_path, plucker_embedding, read_camera_path
from animatediff.models.camera_network import CameraFeatures, camera_merged
from animatediff.models.unet import UNet
from animatediff.utils import UserError

WINDOWS = 4  # whose features are kept: of SD 1.5 at 512x512 in half precision, 80 MB each


@contextmanager
def camera(denoise: FrameDenoise, run: Run) -> Iterator[FrameDenoise]:
    """`camera`: poses of each frame, relative to the first frame that the network sees."""
    options, model, size = run.request.camera, run.model, run.request.size
    if not (options.poses or options.move) or options.scale == 0:
        yield denoise
        return
    network, features = model.networks["camera"], CameraFeatures(options.scale)
    path = run.once("camera", lambda: read_path(run.request))

    def encoder() -> Callable[[tuple[int, ...]], list[Tensor]]:
        @lru_cache(maxsize=WINDOWS)
        def encode(frames: tuple[int, ...]) -> list[Tensor]:
            rays = plucker_embedding(path.of(torch.tensor(frames)), size.height, size.width)
            return network.pose_encoder(rays.to(model.device, model.dtype))

        return encode

    encode = run.once("camera encoder", encoder)

    def moved(x: Tensor, t: Tensor, frames: Tensor, **inputs: Any) -> Tensor:
        features.values = encode(tuple(frames.tolist()))
        return denoise(x, t, frames, **inputs)

    with camera_merged(model.unet, network, features):
        yield moved


def load(request: Request, headers: Any, image: ImageModel, unet: UNet) -> tuple[nn.Module, str] | None:
    """The camera encoder, and a line about it; None without one."""
    if "camera.path" not in headers.paths:
        return None
    network, report = load_cameractrl(headers.paths["camera.path"], unet)
    return network, str(report)


def read_path(request: Request) -> CameraPath:
    """The camera of every frame of a clip.

    Raises:
        UserError: the file cannot be read, or has fewer poses than the clip has frames.
    """
    options, frames = request.camera, request.size.num_frames
    if options.move:
        return move_path(options.move, frames, speed=options.speed)
    if (file := find_file(options.poses)) is None:
        raise UserError(f"camera.poses: {missing_file(options.poses)}")
    path = read_camera_path(file)
    if len(path) < frames:
        raise UserError(f"camera.poses: got {len(path)} poses in {file} for {frames} frames, expected one for each")
    return path
