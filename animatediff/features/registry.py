"""Every feature that reaches into a run of the sampler, and the networks that features bring along."""

from __future__ import annotations

from animatediff.features import camera_motion as camera_feature
from animatediff.features import controlnet as controlnet_feature
from animatediff.features import image_to_video as image_to_video_feature
from animatediff.features import ip_adapter as ip_adapter_feature
from animatediff.features import motion_mixture as motion_mixture_feature
from animatediff.features import perturbed_attention as perturbed_attention_feature
from animatediff.features import pia as pia_feature
from animatediff.features import sparsectrl as sparsectrl_feature
from animatediff.features.camera_motion import camera
from animatediff.features.controlnet import controlnet
from animatediff.features.feature import Feature
from animatediff.features.freeu import freeu
from animatediff.features.image_to_video import image_to_video
from animatediff.features.ip_adapter import ip_adapter
from animatediff.features.lora_schedule import lora_schedule
from animatediff.features.motion_mixture import motion_mixture
from animatediff.features.motion_scale import motion
from animatediff.features.perturbed_attention import perturbed_attention
from animatediff.features.pia import pia
from animatediff.features.sparsectrl import sparsectrl

# From the network outwards: a later one sees what the earlier ones made of the network, and its inputs pass through
# them (a ControlNet adds its residuals to SparseCtrl's).
FEATURES: tuple[Feature, ...] = (
    *(motion, perturbed_attention, freeu, lora_schedule),
    *(ip_adapter, pia, image_to_video, motion_mixture, camera, controlnet, sparsectrl),
)

# group of the request -> what loads its networks, or looks at what is there: (request, headers, image model, UNet with
# its motion module) -> a network and a line for the log, or None
NETWORKS = {
    "pag": perturbed_attention_feature.load,
    "sparsectrl": sparsectrl_feature.load,
    "controlnets": controlnet_feature.load,
    "ip_adapters": ip_adapter_feature.load,
    "pia": pia_feature.load,
    "i2v": image_to_video_feature.load,
    "camera": camera_feature.load,
    "mixture": motion_mixture_feature.load,
}
