"""LayerNorm (Ba et al. 2016, arXiv 1607.06450, Eq. 4) and an encoding of the frame, as the maths has it."""

from torch import Tensor


def layer_norm_reference(x: Tensor, weight: Tensor, bias: Tensor, code: Tensor | None, eps: float) -> Tensor:
    """x and the result: ((b frames), s, c); code: (frames, c), added to the tokens of its frame."""
    mean = x.mean(-1, keepdim=True)
    variance = x.var(-1, unbiased=False, keepdim=True)
    y = (x - mean) / (variance + eps).sqrt() * weight + bias
    return y if code is None else (y.unflatten(0, (-1, len(code))) + code[:, None]).flatten(0, 1)
