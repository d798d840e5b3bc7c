"""The one door to attention: every attention of the models goes through these functions."""

from animatediff_kernels.attention import attention
from animatediff_kernels.temporal_attention import temporal_attention

__all__ = ["attention", "temporal_attention"]
