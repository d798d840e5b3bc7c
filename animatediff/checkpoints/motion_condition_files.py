"""What PIA's and AnimateLCM-I2V's motion-module files hold besides: the network that tells the UNet of a picture."""

from __future__ import annotations

from pathlib import Path

import torch

from animatediff.checkpoints.diffusers_json import UNET_STEM
from animatediff.checkpoints.files import StateDict, file_sha256, find_weights, read_state_dict
from animatediff.checkpoints.identify import CONDITIONED_MOTION, identify_tensors
from animatediff.checkpoints.load import LoadReport, blank, load_strictly
from animatediff.checkpoints.mapped import converted
from animatediff.models.image_to_video_network import PictureEncoder
from animatediff.models.pia_network import PIACondition
from animatediff.models.unet import UNet
from animatediff.utils import UserError

IMG_ENCODER = "img_encoder."


def load_motion_condition(path: str | Path, unet: UNet) -> tuple[PIACondition | PictureEncoder, LoadReport] | None:
    """Load the picture's part of a motion-module file, in the UNet's dtype and on its device; None where it has none.

    Args:
        path: what `load_motion_module` takes.

    Raises:
        UserError: it is incomplete, or made for another model.
    """
    path = Path(path)
    weights = find_weights(path, UNET_STEM, UNET_STEM) if path.is_dir() else path
    if weights is None:
        return None
    file = read_state_dict(weights)
    info = identify_tensors(file.tensors, file.metadata, path=path)
    if info.kind not in CONDITIONED_MOTION:
        return None
    if info.kind == "pia":
        tensors, network = _pia(file.tensors, unet, path), blank(PIACondition, unet.config.in_channels, _width(unet))
    else:
        encoder = {k.removeprefix(IMG_ENCODER): t for k, t in file.tensors.items() if k.startswith(IMG_ENCODER)}
        tensors, network = encoder, blank(PictureEncoder, unet.config)
    sample = next(unet.parameters())
    ready = converted(tensors, sample.device, sample.dtype)
    network = load_strictly(network, ready, f"{info.kind} network for pictures", path)
    report = LoadReport(path, info.kind, CONDITIONED_MOTION[info.kind], file_sha256(path), applied=len(ready))
    return network, report


def motion_condition_tensors(network: PIACondition | PictureEncoder, unet: UNet) -> StateDict:
    """The entries of a motion-module file that `load_motion_condition` reads such a network from."""
    if isinstance(network, PIACondition):
        weight = torch.cat([unet.conv_in.weight, network.conv.weight], dim=1)
        return {"conv_in.weight": weight, "conv_in.bias": unet.conv_in.bias}
    return {IMG_ENCODER + key: tensor for key, tensor in network.state_dict().items()}


def _pia(tensors: StateDict, unet: UNet, path: Path) -> StateDict:
    """The channels of the mask and the picture. The other four and the bias are those of the image model."""
    weight, latent = tensors["conv_in.weight"], unet.config.in_channels
    if weight.shape[:2] != (_width(unet), 2 * latent + 1):
        raise UserError(
            f"{path}: got a conv_in of shape {tuple(weight.shape)}, expected ({_width(unet)}, {2 * latent + 1}, 3, 3), "
            "a PIA motion module for this base: choose another file"
        )
    return {"conv.weight": weight[:, latent:]}


def _width(unet: UNet) -> int:
    return unet.config.block_out_channels[0]
