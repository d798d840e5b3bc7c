"""A local CLIP of transformers as an encoder of pictures and texts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from animatediff.checkpoints.files import file_sha256, find_weights, read_json, read_state_dict
from animatediff.metrics.references import cover
from animatediff.models.tokenizer import Tokenizer
from animatediff.utils import UserError, describe

# What transformers and torch raise of a config that describes no network.
BAD_CONFIG = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError, AssertionError)
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's, of pixels in [0, 1]


class LocalCLIP:
    """A CLIP of transformers (`CLIPModel`) from local files; nothing is fetched.

    Args:
        path: a folder with `config.json`, weights (`model.safetensors` or `pytorch_model.bin`) and, where they are
            not CLIP's own, the tokenizer's files and `preprocessor_config.json`; or the weights in such a folder.
        device: the CPU by default.

    Raises:
        UserError: a file is missing or damaged, or holds another model.
    """

    def __init__(self, path: str | Path, *, device: torch.device | None = None):
        path, self.device = Path(path), device or torch.device("cpu")
        if not path.exists():
            raise UserError(f"got --clip {path}, which does not exist: give world or a local CLIP's folder")
        folder = path if path.is_dir() else path.parent
        weights = find_weights(folder, "model", "pytorch_model") if path.is_dir() else path
        if weights is None:
            raise UserError(f"got {path} without weights, expected model.safetensors or pytorch_model.bin in it")
        self.model = _build(folder, weights).to(self.device)
        self.size: int = self.model.config.vision_config.image_size
        self.max_length: int = self.model.config.text_config.max_position_embeddings
        own = any((folder / name).is_file() for name in ("vocab.json", "tokenizer.json"))
        self._tokenizer = Tokenizer.from_folder(folder) if own else Tokenizer()
        preprocessing = folder / "preprocessor_config.json"
        known = read_json(preprocessing) if preprocessing.is_file() else {}
        self._mean, self._std = (
            _per_channel(known.get(key, default), f"{preprocessing}: {key}").to(self.device)
            for key, default in (("image_mean", MEAN), ("image_std", STD))
        )
        self.name = f"{path} (sha256 {file_sha256(weights)[:16]})"
        try:  # what no weight tells: heads, activation, epsilon
            self.encode_images(torch.zeros(1, 3, 8, 8)), self.encode_texts(["a"])
        except BAD_CONFIG as error:
            raise UserError(f"got {folder}/config.json, with which it cannot run: {_first_line(error)}") from None

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        """Unit embeddings (n, d) of pictures (n, 3, H, W) in [-1, 1]: resized, cropped and normalised as CLIP's."""
        pixels = cover(images, self.size).to(self.device) / 2 + 0.5
        pooled = self.model.vision_model(pixel_values=(pixels - self._mean) / self._std).pooler_output
        return F.normalize(self.model.visual_projection(pooled), dim=-1).cpu()

    @torch.no_grad()
    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """Unit embeddings (n, d) of texts; what goes beyond 75 tokens is cut off, as CLIP was trained."""
        ids = self._tokenizer(list(texts), max_length=self.max_length)[:, 0].to(self.device)
        states = self.model.text_model(input_ids=ids).last_hidden_state
        end = (ids == self._tokenizer.end_id).int().argmax(dim=1)  # transformers' own pooling trusts wrong config files
        pooled = states[torch.arange(len(ids)), end]
        return F.normalize(self.model.text_projection(pooled), dim=-1).cpu()


def _per_channel(values: object, where: str) -> Tensor:
    """Three numbers as (3, 1, 1). Raises: UserError where they are none."""
    numbers = values if isinstance(values, (list, tuple)) else ()
    if len(numbers) != 3 or not all(type(n) in (int, float) and abs(n) < 1e6 for n in numbers):
        raise UserError(f"got {where} of {describe(values)}, expected three numbers")
    return torch.tensor(numbers, dtype=torch.float32)[:, None, None]


def _build(folder: Path, weights: Path) -> torch.nn.Module:
    from huggingface_hub import errors  # here: these take seconds, and the world's encoder does without them
    from transformers import CLIPConfig, CLIPModel

    content = read_json(folder / "config.json")  # heads and activation cannot be told from weights
    if content.get("model_type") != "clip":
        raise UserError(f"got {folder}/config.json of a {content.get('model_type')!r} model, expected 'clip'")
    tensors = {k: t.float() for k, t in read_state_dict(weights).tensors.items() if not k.endswith("position_ids")}
    try:
        config = CLIPConfig.from_dict(content)
        if max(config.text_config.num_hidden_layers, config.vision_config.num_hidden_layers) > len(tensors):
            raise ValueError("more layers than there are weights")
        with torch.device("meta"):  # sizes that a file names are made once the weights have them
            own = {key: tuple(t.shape) for key, t in CLIPModel(config).state_dict().items()}
    except (*BAD_CONFIG, getattr(errors, "StrictDataclassError", ValueError)) as error:
        raise UserError(f"got {folder}/config.json, which describes no CLIP: {_first_line(error)}") from None
    wrong = sorted(own.keys() ^ tensors.keys()) or [k for k, shape in own.items() if tuple(tensors[k].shape) != shape]
    if wrong:
        raise UserError(
            f"got {weights}, which does not fit {folder}/config.json ({wrong[0]}), expected transformers' CLIPModel"
        )
    if bad := next((key for key, t in tensors.items() if not t.isfinite().all()), None):
        raise UserError(f"got {weights}, whose {bad} is not finite, expected numbers: the file is damaged")
    model = CLIPModel(config)
    model.load_state_dict(tensors)
    return model.eval()


def _first_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:150] or type(error).__name__
