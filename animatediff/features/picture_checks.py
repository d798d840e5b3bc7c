"""Whether the pictures, clips and poses of ControlNet, IP-Adapter, PIA, AnimateLCM-I2V and CameraCtrl can be read."""

from __future__ import annotations

from animatediff.config.request import Request
from animatediff.features.camera_motion import read_path
from animatediff.features.controlnet import read_hints
from animatediff.features.guide_pictures import read_pictures
from animatediff.utils import naming


def check_pictures(request: Request, *, complete: bool = True) -> None:
    """Read them all, before any network is loaded. complete: as of `refusals`.

    Raises:
        UserError: one cannot be read, or there are too few of them.
    """
    for i, net in enumerate(request.controlnets.nets):
        if not complete and not len(net.images):
            continue
        with naming(f"controlnet[{i}]"):
            read_hints(net, request)
    for i, adapter in enumerate(request.ip_adapters.adapters):
        with naming(f"ip_adapter[{i}]"):
            read_pictures(adapter.images)
            read_pictures(adapter.masks)
    for group in ("pia", "i2v"):
        if (image := getattr(request, group).image) is not None:
            with naming(group):
                read_pictures(image)
    if request.camera.path and (complete or request.camera.poses or request.camera.move):
        read_path(request)
