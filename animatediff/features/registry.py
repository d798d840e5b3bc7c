"""Every feature that reaches into a run of the sampler, and the networks that features bring along."""

from __future__ import annotations

from animatediff.features import sparsectrl as sparsectrl_feature
from animatediff.features.freeu import freeu
from animatediff.features.lora_schedule import lora_schedule
from animatediff.features.motion import motion
from animatediff.features.perturbed_attention import perturbed_attention
from animatediff.features.run import Feature
from animatediff.features.sparsectrl import sparsectrl

# From the network outwards: a later one sees what the earlier ones made of the network.
FEATURES: tuple[Feature, ...] = (motion, perturbed_attention, freeu, lora_schedule, sparsectrl)

# group of the request -> what loads the network of its `path`: (request, headers, image model) -> network, and a line
# for the log
NETWORKS = {"sparsectrl": sparsectrl_feature.load}
