"""The one door to attention: every attention of the models goes through these functions."""

from animatediff_kernels.attention import attention
from animatediff_kernels.dispatch import explain, use_backend
from animatediff_kernels.temporal_attention import temporal_attention, temporal_attention_packed

__all__ = ["attention", "explain", "temporal_attention", "temporal_attention_packed", "use_backend"]
