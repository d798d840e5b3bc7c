"""LoRAs that learn: image LoRA, domain adapter and MotionLoRA are one mechanism on different layers."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from animatediff.checkpoints.lora_files import read_lora, write_lora
from animatediff.checkpoints.lora_keys import lora_keys
from animatediff.models.lora import AttachedLoRA, LoRA, LoRAStack
from animatediff.models.lora_layers import LoRAEntry
from animatediff.models.text import TextEncoder
from animatediff.models.unet import UNet
from animatediff.training.sources import resolve_path
from animatediff.utils import UserError

Kind = Literal["lora", "motion-lora", "domain-adapter", "consistency"]
Algorithm = Literal["lora", "locon", "loha", "lokr", "dora"]  # locon: lora that changes convolutions too
QKV_OUT = r"to_(q|k|v|out\.0)"
SPATIAL = r"(.*\.)?attentions\.\d+\."
TRANSFORMER = r"transformer_blocks\.\d+\."
LAYERS: dict[str, str] = {  # of the UNet, by kind
    "lora": rf"{SPATIAL}(proj_in|proj_out|{TRANSFORMER}(attn[12]\.{QKV_OUT}|ff\.net\.(0\.proj|2)))",
    "domain-adapter": rf"{SPATIAL}{TRANSFORMER}attn[12]\.{QKV_OUT}",
    "motion-lora": rf".*motion_modules\.\d+\..*\.attention_blocks\.\d+\.{QKV_OUT}",
}
LAYERS["consistency"] = f"{LAYERS['lora']}|{LAYERS['motion-lora']}"
CONVOLUTIONS = (  # with their neighbours, as kohya's conv_dim takes them
    r"(.*\.)?(resnets\.\d+\.(conv1|conv2|conv_shortcut|time_emb_proj)|(down|up)samplers\.0\.conv)"
)
TEXT_LAYERS = r".*\.layers\.\d+\.(self_attn\.(q|k|v|out)_proj|mlp\.fc[12])"


@dataclass(frozen=True)
class TrainableLoRA:
    """A LoRA on a network. `attached` is the module whose parameters learn; `lora` names its tensors."""

    lora: LoRA
    attached: AttachedLoRA

    def save(self, path: Path, metadata: Mapping[str, str]) -> Path:
        """Write the weights as they are now, in float16."""
        changes = self.attached.changes
        entries = [replace(e, tensors=c.tensors()) for e, c in zip(self.lora.entries, changes, strict=True)]
        facts = {**self.lora.metadata, **metadata}
        return write_lora(replace(self.lora, entries=tuple(entries), metadata=facts), path, dtype=torch.float16)


def attach_lora(
    kind: Kind,
    unet: UNet,
    text_encoder: TextEncoder | None = None,
    *,
    rank: int,
    alpha: float | None = None,
    convolutions: bool = False,
    algorithm: Algorithm = "lora",
    init_from: str = "",
) -> TrainableLoRA:
    """Put a LoRA on the layers of its kind: a fresh one, which changes nothing yet, or one to go on from.

    Args:
        kind: "lora" changes the spatial transformers, "domain-adapter" their attentions (arXiv 2307.04725, sec. 4.1),
            "motion-lora" those of the motion modules (sec. 4.3), "consistency" the first and the last.
        text_encoder: changed as well where it is given.
        rank: of every change.
        alpha: the change is multiplied by alpha / rank; rank by default. Only for "lora", the others know no alpha.
        convolutions: change the ResNet blocks and what scales between resolutions as well. Only for "lora".
        algorithm: what a change is made of (`models.lora_algorithms`). AnimateDiff's own keys know plain LoRAs alone:
            others are saved under LyCORIS'.
        init_from: a LoRA file of any dialect, of the same layers, algorithm, rank and alpha.

    Raises:
        UserError: a rank below 1, a network without such layers, or another LoRA to go on from.
    """
    if rank < 1:
        raise UserError(f"rank: got {rank}, expected at least 1")
    convolutions = kind == "lora" and (convolutions or algorithm == "locon")
    wanted = f"{LAYERS[kind]}|{CONVOLUTIONS}" if convolutions else LAYERS[kind]
    layers = [("unet", name, layer) for name, layer in unet.named_modules() if re.fullmatch(wanted, name)]
    if text_encoder is not None:
        layers += [("text", n, layer) for n, layer in text_encoder.named_modules() if re.fullmatch(TEXT_LAYERS, n)]
    if not layers:
        raise UserError(f"got a network without layers for a {kind}, expected one that has attention")
    facts = {}
    kind = "lora" if kind == "consistency" else kind
    if kind == "lora":
        alpha = float(rank) if alpha is None else alpha
        facts = {"ss_network_dim": str(rank), "ss_network_alpha": f"{alpha:g}"}
    entries = tuple(
        _fresh(kind, network, name, layer.weight, rank, alpha, algorithm) for network, name, layer in layers
    )
    if init_from:
        entries = _learnt(entries, read_lora(resolve_path(init_from)))
    lora = LoRA("trained", kind, entries, metadata=facts)
    stack = LoRAStack(unet, text_encoder)
    stack.add(lora)
    attached = stack.loras[0]
    attached.requires_grad_(True)
    return TrainableLoRA(lora, attached)


def _learnt(fresh: Sequence[LoRAEntry], lora: LoRA) -> tuple[LoRAEntry, ...]:
    """Fresh entries with the tensors of a LoRA. Raises: UserError where it changes other layers, or in another way."""
    found, wanted = ({entry.target: entry for entry in entries} for entries in (lora.entries, fresh))
    if more := sorted(found.keys() ^ wanted.keys()):
        raise UserError(
            f"init_from: got a LoRA on {len(found)} layers, expected the {len(wanted)} of this stage: {more[0]} is in "
            "one of them alone; set the same options, or start from a fresh LoRA"
        )
    for own, other in ((entry, found[entry.target]) for entry in fresh):
        if _form(own) != _form(other):
            raise UserError(
                f"init_from: got {_form(other)} in {own.target}, expected {_form(own)}: set the same algorithm, rank "
                "and alpha"
            )
    return tuple(
        replace(
            entry,
            tensors={
                key: found[entry.target].tensors[key].float().reshape(t.shape) for key, t in entry.tensors.items()
            },
        )
        for entry in fresh
    )


def _form(entry: LoRAEntry) -> str:
    sizes = {key: "x".join(str(n) for n in t.shape if n > 1) or "1" for key, t in sorted(entry.tensors.items())}
    return f"{entry.algorithm} of {', '.join(f'{key} {size}' for key, size in sizes.items())}, times {entry.factor():g}"


def _fresh(
    kind: str, network: str, name: str, weight: Tensor, rank: int, alpha: float | None, algorithm: Algorithm
) -> LoRAEntry:
    tensors = {"loha": _fresh_loha, "lokr": _fresh_lokr}.get(algorithm, _fresh_lora)(weight.cpu(), rank)
    if algorithm == "dora":  # magnitudes of the rows, which make the sum W at first (arXiv 2402.09353, Eq. 5)
        tensors["magnitude"] = weight.detach().cpu().float().flatten(1).norm(dim=1, keepdim=True)
    formula = "lora" if "down" in tensors else algorithm
    if formula == "lokr" and "w2" in tensors:
        alpha = None  # without low-rank factors it has no meaning
    names = [*tensors, *(["alpha"] if alpha is not None else [])]
    if kind == "lora" or tensors.keys() != {"down", "up"}:
        keys = lora_keys("lora", network, name, algorithm=formula, names=names)
    else:
        keys = lora_keys(kind, network, name)
    target = f"{network}.{name.replace('.', '_')}"
    return LoRAEntry(target, tensors, alpha=alpha, algorithm=formula, keys=keys)


def _fresh_lora(weight: Tensor, rank: int) -> dict[str, Tensor]:
    """down is normal, up zero (Hu et al. 2021, arXiv 2106.09685, sec. 4.1)."""
    return {
        "down": torch.randn(rank, *weight.shape[1:]) / rank,
        "up": torch.zeros(weight.shape[0], rank, *(1 for _ in weight.shape[2:])),
    }


def _fresh_loha(weight: Tensor, rank: int) -> dict[str, Tensor]:
    """Three factors are normal, one is zero (LyCORIS, arXiv 2309.14859, sec. 3.2)."""
    outputs, inputs = weight.flatten(1).shape
    return {
        "w1_a": 0.1 * torch.randn(outputs, rank),
        "w1_b": torch.randn(rank, inputs),
        "w2_a": torch.zeros(outputs, rank),
        "w2_b": torch.randn(rank, inputs),
    }


def _fresh_lokr(weight: Tensor, rank: int) -> dict[str, Tensor]:
    """w1 of the smaller factors of both sides, whole; w2 of the larger ones, low-rank where that is smaller."""
    outputs, inputs = weight.shape[:2]
    (a, c), (b, d) = factors(outputs), factors(inputs)
    tensors = {"w1": torch.randn(a, b) / b**0.5}
    kernel = weight[0, 0].numel()
    if rank * (c + d * kernel) >= c * d * kernel:
        return tensors | {"w2": torch.zeros(c, d, *weight.shape[2:])}
    return tensors | {"w2_a": torch.randn(c, rank) / rank**0.5, "w2_b": torch.zeros(rank, d * kernel)}


def factors(size: int) -> tuple[int, int]:
    """A size as a product of two whole numbers as near each other as can be, the smaller first."""
    small = next(n for n in range(math.isqrt(size), 0, -1) if size % n == 0)
    return small, size // small
