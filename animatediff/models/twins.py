"""A module once more, on the same storage or with other weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


def share_weights(module: M, weights: Mapping[int, Tensor] | None = None) -> M:
    """A second module on the same storage: moving it, or giving it other weights, leaves the first as it was.

    What else a module remembers is the same in both, unless it is a list, a dict or a set: of these each has its own.

    Args:
        weights: tensors whose storage takes the place of the module's own, by the `id` of its parameter or buffer.
    """
    weights = weights or {}
    modules = list(module.modules())
    twins: dict[int, Any] = {id(m): object.__new__(type(m)) for m in modules}
    for m in modules:
        for p in filter(_there, m._parameters.values()):
            twins[id(p)] = nn.Parameter(weights.get(id(p), p).detach(), p.requires_grad)
        for b in filter(_there, m._buffers.values()):
            twins[id(b)] = weights.get(id(b), b).detach()
    for m in modules:
        own = vars(twins[id(m)])
        remembered = {k: v for k, v in vars(m).items() if k != "forward"}  # one of its own knows its module alone
        own |= {k: v.copy() if isinstance(v, (dict, list, set)) else v for k, v in remembered.items()}
        for held in ("_parameters", "_buffers", "_modules"):
            own[held] = {name: twins.get(id(value)) for name, value in own[held].items()}
    return twins[id(module)]


def _there(tensor: Tensor | None) -> bool:
    return tensor is not None
