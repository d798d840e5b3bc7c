"""What is refused in any weight file: names and sizes that lie, numbers that are no weights or not finite."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from animatediff.utils import UserError

# What weights are made of. Others are quantised, which needs the code that quantised them.
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
FLOATS_OF_8_BITS = tuple(
    t for name in dir(torch) if name.startswith("float8_") and isinstance(t := getattr(torch, name), torch.dtype)
)
# Vectors of whole numbers that are no weights: positions, indices, and what pickles of embeddings say of their words.
INDICES = re.compile(
    r"position_ids|bias_indices|bias_size|string_to_token|num_batches_tracked|num_updates|^v_pred|^ztsnr|^tokens$"
)
SCALES = {".scale_weight": ".weight", ".weight_scale": ".weight"}  # of 8-bit floats -> the weight they belong to
INPUT_SCALE = r"\.(scale_input|input_scale)$|(^|\.)scaled_fp8$"  # for arithmetic in 8 bits, which is not done here
LONGEST_KEY = 500  # characters


def check_finite(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Name a file with weights that are not finite, which would spoil every frame.

    Raises:
        UserError: there is a NaN or an infinity.
    """
    floats = {key: t for key, t in tensors.items() if t.is_floating_point() and not t.is_meta}
    if not floats:
        return
    # One pass without a temporary: a sum of finite numbers is finite, but for sums beyond float32.
    sums = torch.stack([_plain(tensor).sum(dtype=torch.float32) for tensor in floats.values()])
    for (key, tensor), finite in zip(floats.items(), sums.isfinite().tolist(), strict=True):
        if not finite and not _plain(tensor).isfinite().all():
            raise UserError(
                f"got {path} with numbers in {key} that are not finite in {str(tensor.dtype).removeprefix('torch.')}, "
                "expected weights: the file is damaged, download it again (or load it in float32)"
            )


def _plain(tensor: Tensor) -> Tensor:
    """Floats that torch computes with."""
    return tensor.float() if tensor.itemsize == 1 else tensor


def check_keys(tensors: Mapping[str, Tensor]) -> None:
    """Refuse names that no software writes: they reach the console, and the numbers in them become sizes.

    Raises:
        UserError: a name that cannot be printed or is endless, or counts further than there are tensors.
    """
    most = max(1000, len(tensors))
    for key in tensors:
        if not key.isprintable() or len(key) > LONGEST_KEY:
            raise UserError(f"got an entry named {key[:80]!r}, expected the name of a weight: the file is damaged")
        for number in re.findall(r"(?<![^.])[0-9]{4,}(?![^.])", key):
            if len(number) > 9 or int(number) > most:
                raise UserError(
                    f"got {key}, expected numbers up to the {len(tensors)} entries there are: it is damaged"
                )


def check_tensors(tensors: Mapping[str, Tensor], size: int) -> None:
    """Plain floating-point numbers, all of which are in the file."""
    total = 0
    for key, t in tensors.items():
        plain = type(t) is Tensor and t.layout == torch.strided and t.device.type == "cpu" and not t.is_quantized
        if not plain or t.is_nested or t.numel() * t.itemsize > t.untyped_storage().nbytes():
            raise UserError(
                f"got {key} as a tensor that is not plain, expected its numbers: use a .safetensors release"
            )
        if key.endswith((".weight", ".bias")) and (t.dim() == 0 or t.numel() == 0):
            raise UserError(f"got shape {tuple(t.shape)} of {key}, expected numbers: the file is damaged")
        total += t.nbytes
        if (
            t.dtype not in (*FLOATS, *FLOATS_OF_8_BITS)
            and (t.numel() > 1 or t.is_complex())
            and not INDICES.search(key)
        ):
            what = str(t.dtype).removeprefix("torch.")
            raise UserError(
                f"got {what} numbers in {key}, expected floating-point weights: quantised files need the program that "
                "made them; use a release in float16, bfloat16 or float32"
            )
    if total > 4 * size + (1 << 20):  # some names may share one tensor
        raise UserError(f"got {total:,} bytes of weights in a file of {size:,}, expected no more: it is damaged")


def dequantised(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """8-bit floats times the scales beside them, float32; all other tensors as they are."""
    scales = {
        key.removesuffix(end) + weight: key for key in tensors for end, weight in SCALES.items() if key.endswith(end)
    }
    of_8_bits = [key for key in scales if key in tensors and tensors[key].dtype in FLOATS_OF_8_BITS]
    if not of_8_bits:
        return tensors, []
    gone = {scales[key] for key in of_8_bits}
    plain = {key: t for key, t in tensors.items() if key not in gone and not re.search(INPUT_SCALE, key)}
    for key in of_8_bits:
        weight = tensors[key].float()
        scale = tensors[scales[key]].to(weight)
        if scale.numel() not in (1, len(weight)):
            raise UserError(f"got {scale.numel()} scales for {key}, expected 1 or {len(weight)}: the file is damaged")
        plain[key] = weight * scale.reshape(-1, *(1 for _ in weight.shape[1:]))
    return plain, [f"{len(of_8_bits)} weights of 8 bits were multiplied by their scales"]
