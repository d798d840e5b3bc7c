"""What each kind of adapter adds to a weight: functions of the adapter's tensors and the weight, in float32.

LoRA (arXiv 2106.09685), LoCon, LoHa and LoKr (LyCORIS, arXiv 2309.14859), (IA)3 (arXiv 2205.05638), OFT (arXiv
2306.07280), BOFT (arXiv 2311.06243), GLoRA (arXiv 2306.07967), DoRA (arXiv 2402.09353).

In every function `t` maps the names in `TENSORS` to tensors, `weight` is the layer's own, (o, i) or (o, i, k, k), and r
is a rank. Kernels of 1x1 convolutions and matrices interchange.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

Tensors = Mapping[str, Tensor]

# algorithm -> its tensors. Any of them may have `bias` (o) and, where `SCALED`, what `weight_change` adds.
TENSORS = {
    "lora": ("down", "up", "mid"),
    "loha": ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2"),
    "lokr": ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2"),
    "ia3": ("gain",),
    "full": ("weight",),
    "oft": ("blocks", "rescale"),
    "boft": ("blocks", "rescale"),
    "glora": ("a1", "a2", "b1", "b2", "bm"),
}
COMMON = ("bias", "magnitude", "residual_indices", "residual_values")
SCALED = ("lora", "loha", "lokr", "glora")  # by alpha / rank


def low_rank(down: Tensor, up: Tensor, mid: Tensor | None = None) -> Tensor:
    """up (o, r) @ down (r, i[, k, k]), or up (o, p) @ mid (p, q, k, k) @ down (q, i): (o, i[, k, k])."""
    down, up = down.float(), up.float()
    if mid is not None:
        return torch.einsum("or,rskl,si->oikl", up.flatten(1), mid.float(), down.flatten(1))
    return (up.flatten(1) @ down.flatten(1)).unflatten(1, down.shape[1:])


def _lora(t: Tensors, weight: Tensor) -> Tensor:
    return low_rank(t["down"], t["up"], t.get("mid"))


def _loha(t: Tensors, weight: Tensor) -> Tensor:
    """The elementwise product of two low-rank matrices, (o, r) @ (r, i·k·k) each, or of two in Tucker form."""
    return _pair(t, "w1", "t1") * _pair(t, "w2", "t2")


def _pair(t: Tensors, name: str, middle: str) -> Tensor:
    a, b = t[f"{name}_a"], t[f"{name}_b"]
    if middle in t:  # a is (r, o) here
        return torch.einsum("pqkl,po,qi->oikl", t[middle], a.flatten(1), b.flatten(1))
    return a.flatten(1) @ b.flatten(1)


def _lokr(t: Tensors, weight: Tensor) -> Tensor:
    """The Kronecker product of w1 (a, b) and w2 (c, d[, k, k]), each given whole or as a product; o = a c, i = b d."""
    w1 = t["w1"].flatten(1) if "w1" in t else _pair(t, "w1", "")
    w2 = t["w2"].flatten(1) if "w2" in t else _pair(t, "w2", "t2").flatten(1)
    return torch.kron(w1, w2)  # kernels flattened: (a c, b (d k k))


def _ia3(t: Tensors, weight: Tensor) -> Tensor:
    """W times a gain for every output (o, 1) or input (1, i)."""
    return weight * _along(t["gain"], weight)


def _full(t: Tensors, weight: Tensor) -> Tensor:
    return t["weight"]


def _glora(t: Tensors, weight: Tensor) -> Tensor:
    """W a1 a2 over its input channels, plus b1 (o, r) b2 (r, i); files of LyCORIS 1 have all four transposed."""
    a1, a2, b1, b2 = (t[name] for name in ("a1", "a2", "b1", "b2"))
    if a1.shape[0] != weight.shape[1] or b1.shape[0] != weight.shape[0]:
        a1, a2, b1, b2 = a2, a1, b2, b1
    mixed = torch.einsum("oi...,ij->oj...", weight, a1.flatten(1) @ a2.flatten(1))
    return mixed + low_rank(b2, b1, t.get("bm")).reshape(weight.shape)


def _oft(t: Tensors, weight: Tensor, alpha: float | None, scale: float) -> Tensor:
    """Blocks of output rows rotated: W'[k, m] = sum over n of R[k, n, m] W[k, n]."""
    rotation = _rotations(t["blocks"], alpha, len(weight))
    rows = weight.unflatten(0, rotation.shape[:2])
    return scale * (_rescaled(torch.einsum("knm,kn...->km...", rotation, rows).flatten(0, 1), t) - weight)


def _boft(t: Tensors, weight: Tensor, alpha: float | None, scale: float) -> Tensor:
    """A butterfly of such rotations; the scale takes each of its factors from the identity towards R."""
    turned = weight
    factors = _rotations(t["blocks"], alpha, len(weight))
    factors = torch.lerp(torch.eye(factors.shape[-1], device=factors.device).expand_as(factors), factors, scale)
    for j, factor in enumerate(factors):
        half = 2**j * (factor.shape[-1] // 2)
        rows = turned.unflatten(0, (-1, 2, half)).transpose(1, 2).flatten(0, 2)
        rows = torch.einsum("bij,bj...->bi...", factor, rows.unflatten(0, factor.shape[:2])).flatten(0, 1)
        turned = rows.unflatten(0, (-1, half, 2)).transpose(1, 2).flatten(0, 2)
    return turned + scale * (_rescaled(turned, t) - turned) - weight


def _rotations(blocks: Tensor, alpha: float | None, outputs: int) -> Tensor:
    """(I + Q) (I - Q)^-1 of Q = B - B^T, whose norm over all blocks is at most alpha times the outputs."""
    q = blocks - blocks.mT
    if alpha:
        q = q * (alpha * outputs / q.norm().clamp(min=1e-12)).clamp(max=1)
    eye = torch.eye(q.shape[-1], device=q.device, dtype=q.dtype).expand_as(q)
    return torch.linalg.solve(eye - q, eye + q, left=False)


def _rescaled(weight: Tensor, t: Tensors) -> Tensor:
    return weight * _along(t["rescale"].flatten()[:, None], weight) if "rescale" in t else weight


def _along(vector: Tensor, weight: Tensor) -> Tensor:
    """A vector (o, 1) or (1, i) in the weight's number of dimensions."""
    return vector.reshape(*vector.shape[:2], *(1 for _ in weight.shape[2:]))


CHANGES: dict[str, Callable[[Tensors, Tensor], Tensor]] = {
    "lora": _lora,
    "loha": _loha,
    "lokr": _lokr,
    "ia3": _ia3,
    "full": _full,
    "glora": _glora,
}
ROTATIONS: dict[str, Callable[[Tensors, Tensor, float | None, float], Tensor]] = {"oft": _oft, "boft": _boft}


def weight_change(
    algorithm: str, t: Tensors, weight: Tensor, *, factor: float = 1.0, alpha: float | None = None, scale: float = 1.0
) -> Tensor:
    """What is added to a layer's weight, float32 and of its shape.

    All but BOFT are linear in the scale, DoRA too: scale * (W' - W), where W' = m V / |V| and V = W + factor * change.

    Args:
        algorithm: a key of TENSORS.
        t: its tensors, float32; `magnitude` (o, 1) or (1, i) makes it a DoRA; `residual_values` at the
            `residual_indices` (2, n) of the matrix (o, i·k·k) are added to the change.
        weight: the layer's, unchanged.
        factor: alpha / rank, where the algorithm has a rank.
        alpha: of OFT and BOFT, the bound on their rotation.

    Raises:
        RuntimeError, KeyError, IndexError, ValueError: the tensors do not fit the weight.
    """
    weight = weight.float()
    if algorithm in ROTATIONS:
        return ROTATIONS[algorithm](t, weight, alpha, scale)
    change = _shaped(CHANGES[algorithm](t, weight), weight)
    if "residual_values" in t:
        flat = torch.zeros_like(change).flatten(1).index_put(tuple(t["residual_indices"].long()), t["residual_values"])
        change = change + flat.view_as(change)
    if "magnitude" not in t:
        return factor * scale * change
    moved, magnitude = weight + factor * change, _along(t["magnitude"], weight)
    own = 0 if magnitude.shape[1] == 1 else 1  # the axis of the weight that the magnitudes belong to
    others = [axis for axis in range(weight.dim()) if axis != own]
    norm = torch.linalg.vector_norm(moved, dim=others, keepdim=True)
    return scale * (magnitude / norm * moved - weight)


def _shaped(change: Tensor, weight: Tensor) -> Tensor:
    if change.shape[0] != weight.shape[0] or change.numel() != weight.numel():
        raise ValueError(f"a change of shape {tuple(change.shape)}")
    return change.reshape(weight.shape)
