"""The operations that the models' time goes into, each dispatched to torch's kernels or to this package's Triton ones.

Importing this package imports no triton; without triton, or without a GPU, everything runs on torch.
"""

from animatediff_kernels.attention import attention
from animatediff_kernels.dispatch import provenance, use_backend
from animatediff_kernels.explain import explain
from animatediff_kernels.geglu import geglu
from animatediff_kernels.group_norm_silu import group_norm_silu
from animatediff_kernels.layer_norm import layer_norm
from animatediff_kernels.linear_geglu import linear_geglu
from animatediff_kernels.temporal_attention import temporal_attention

__all__ = [
    "attention",
    "explain",
    "geglu",
    "group_norm_silu",
    "layer_norm",
    "linear_geglu",
    "provenance",
    "temporal_attention",
    "use_backend",
]
