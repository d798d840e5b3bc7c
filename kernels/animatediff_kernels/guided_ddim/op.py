"""Guidance and a DDIM step as a torch operator. Sampling needs no gradient, so there is none."""

import torch
from torch import Tensor

from animatediff_kernels.dispatch import interpreting
from animatediff_kernels.guided_ddim.reference import guided_ddim_reference


def _forward(x: Tensor, both: Tensor, alphas: Tensor, scale: float, velocity: bool) -> Tensor:
    from animatediff_kernels.guided_ddim.triton_kernels import run

    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    run(x.contiguous(), both.contiguous(), alphas.float().contiguous(), scale, velocity, out)
    return out


@torch.library.custom_op("animatediff::guided_ddim", mutates_args=(), device_types="cpu")
def guided_ddim_op(x: Tensor, both: Tensor, alphas: Tensor, scale: float, velocity: bool) -> Tensor:
    if interpreting():
        return _forward(x, both, alphas, scale, velocity)
    return guided_ddim_reference(x, both, alphas, scale, velocity).contiguous()


guided_ddim_op.register_kernel("cuda")(_forward)


@guided_ddim_op.register_fake
def _(x, both, alphas, scale, velocity):
    return torch.empty_like(x, memory_format=torch.contiguous_format)
