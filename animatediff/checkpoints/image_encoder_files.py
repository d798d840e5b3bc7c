"""The image encoder of IP-Adapters: a CLIP vision model of transformers, from a folder or a file, and its pictures."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from animatediff.checkpoints.diffusers_folders import model_folder, write_part
from animatediff.checkpoints.diffusers_json import TEXT_STEMS, Json, optional_json
from animatediff.checkpoints.files import StateDict, find_weights, read_state_dict, write_state_dict
from animatediff.checkpoints.load import build_blank, load_strictly
from animatediff.checkpoints.sizes import TEXT_ACTIVATIONS
from animatediff.checkpoints.small_clip_files import CONFIG_KEY, build_small_clip
from animatediff.models.small_clip import SmallCLIP
from animatediff.utils import UserError, naming

if TYPE_CHECKING:
    from transformers import CLIPVisionModelWithProjection

# Heads and activation by width, which no tensor tells: OpenCLIP's H/14 and bigG/14, OpenAI's L/14.
KNOWN_WIDTHS = {1280: (16, "gelu"), 1664: (16, "gelu"), 1024: (16, "quick_gelu")}
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
SIZED_BY = {  # weights whose shapes tell the network's -> dimensions
    "vision_model.embeddings.patch_embedding.weight": 4,
    "vision_model.embeddings.position_embedding.weight": 2,
    "vision_model.encoder.layers.0.mlp.fc1.weight": 2,
    "visual_projection.weight": 2,
}
OPEN_CLIP = (  # parts of its names below VISUAL -> transformers'
    ("class_embedding", "vision_model.embeddings.class_embedding"),
    ("conv1.", "vision_model.embeddings.patch_embedding."),
    ("positional_embedding", "vision_model.embeddings.position_embedding.weight"),
    ("ln_pre.", "vision_model.pre_layrnorm."),
    ("ln_post.", "vision_model.post_layernorm."),
    ("transformer.resblocks.", "vision_model.encoder.layers."),
    (".ln_1.", ".layer_norm1."),
    (".ln_2.", ".layer_norm2."),
    (".attn.", ".self_attn."),
    (".mlp.c_fc.", ".mlp.fc1."),
    (".mlp.c_proj.", ".mlp.fc2."),
)
VISUAL, PROJECTION, QKV = "visual.", "visual_projection.weight", ("q_proj.", "k_proj.", "v_proj.")


class ImageEncoder(nn.Module):
    """What an IP-Adapter sees of a picture: its embedding, or its tokens before the last layer."""

    mean, std = MEAN, STD  # of the pixels that it takes

    def __init__(self, model: CLIPVisionModelWithProjection):
        super().__init__()
        self.model = model

    def pixels(self, picture: Image.Image, *, fit: str = "crop") -> Tensor:
        """Of a picture, as `clip_pixels`."""
        return clip_pixels(picture, self.size, fit=fit, mean=self.mean, std=self.std)

    def pixels_of(self, frames: Tensor) -> Tensor:
        """Of frames (n, 3, H, W) in [-1, 1], as of pictures in files."""
        rgb = ((frames.clamp(-1, 1) + 1) * 127.5).round().byte().movedim(1, -1).cpu().numpy()
        return torch.cat([self.pixels(Image.fromarray(frame)) for frame in rgb])

    @property
    def size(self) -> int:
        """Pixels of a picture, both sides."""
        return self.model.config.image_size

    @property
    def width(self) -> int:
        return self.model.config.hidden_size

    @property
    def embedding_width(self) -> int:
        return self.model.config.projection_dim

    @torch.no_grad()
    def embeddings(self, pixels: Tensor) -> Tensor:
        """(n, embedding_width), not of length 1, of pixels (n, 3, size, size) as `clip_pixels` makes them."""
        return self.model(pixel_values=pixels.to(self.model.visual_projection.weight)).image_embeds

    @torch.no_grad()
    def hidden(self, pixels: Tensor) -> Tensor:
        """(n, tokens, width) after the second-to-last layer, without the last norm."""
        pixels = pixels.to(self.model.visual_projection.weight)
        return self.model(pixel_values=pixels, output_hidden_states=True).hidden_states[-2]


class SmallImageEncoder(ImageEncoder):
    """The same of the toy data set's encoder."""

    mean, std = (0.5,) * 3, (0.5,) * 3
    model: SmallCLIP

    def __init__(self, model: SmallCLIP):
        nn.Module.__init__(self)
        self.model = model

    @property
    def size(self) -> int:
        return self.model.config.size

    @property
    def width(self) -> int:
        return self.model.config.channels[-1]

    @property
    def embedding_width(self) -> int:
        return self.model.config.width

    @torch.no_grad()
    def embeddings(self, pixels: Tensor) -> Tensor:
        return self.model.encode_images(pixels.to(self.model.text_projection.weight))

    @torch.no_grad()
    def hidden(self, pixels: Tensor) -> Tensor:
        return self.model.image_tokens(pixels.to(self.model.text_projection.weight))


@dataclass(frozen=True)
class ImageEncoderParts:
    """A CLIP vision model in transformers' names; `known`: its config.json, empty without one."""

    path: Path
    tensors: StateDict
    known: Json
    metadata: dict[str, str]
    notes: list[str]
    unused: list[str]


def load_image_encoder(path: str | Path, *, dtype: torch.dtype = torch.float32) -> ImageEncoder:
    """Load a CLIP vision model with projection on the CPU.

    Args:
        path: as of `read_image_encoder_parts`, or the toy data set's encoder.

    Raises:
        UserError: it is something else, incomplete, or of a width that needs a config.json to tell its heads.
    """
    path = Path(path)
    if not path.is_dir() and CONFIG_KEY in (file := read_state_dict(path)).metadata:
        return SmallImageEncoder(build_small_clip(file, path).to(dtype))
    parts = read_image_encoder_parts(path)
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection  # which takes seconds

    with naming(path):
        config = CLIPVisionConfig(**vision_config(parts.tensors, parts.known))
    ready = {key: t.to(dtype) for key, t in parts.tensors.items()}
    model = load_strictly(build_blank(partial(CLIPVisionModelWithProjection, config)), ready, "image encoder", path)
    embeddings = model.vision_model.embeddings
    embeddings.position_ids = torch.arange(embeddings.num_positions)[None]  # computed, in no file
    return ImageEncoder(model)


def read_image_encoder_parts(path: str | Path) -> ImageEncoderParts:
    """Read a CLIP vision model with projection.

    Args:
        path: a transformers folder, its weights alone, or an OpenCLIP file. The text half of a whole CLIP is left out.

    Raises:
        UserError: it is something else.
    """
    path = Path(path)
    weights = find_weights(path, *TEXT_STEMS) if path.is_dir() else path
    if weights is None:
        raise UserError(f"got the folder {path}, expected an image encoder: it has no {TEXT_STEMS[0]}.safetensors")
    file = read_state_dict(weights)
    starts = (VISUAL,) if any(key.startswith(VISUAL) for key in file.tensors) else ("vision_model.", PROJECTION)
    kept = {key: t for key, t in file.tensors.items() if key.startswith(starts) and not key.endswith(".position_ids")}
    tensors = _from_open_clip(kept) if starts == (VISUAL,) else kept
    if PROJECTION not in tensors:
        raise UserError(
            f"got {path}, expected a CLIP vision model with projection (image_encoder/ of h94/IP-Adapter, or "
            "CLIP-ViT-H-14-laion2B-s32B-b79K.safetensors): it has no visual_projection"
        )
    unused = [key for key in file.tensors if key not in kept]
    known = optional_json(weights.with_name("config.json"))
    if isinstance(half := known.get("vision_config"), dict):  # of a whole CLIP
        known = half
    return ImageEncoderParts(path, tensors, known, file.metadata, list(file.notes), unused)


def write_image_encoder(parts: ImageEncoderParts, path: str | Path) -> Path:
    """Write it as an OpenCLIP file, or as a transformers folder where `path` has no suffix.

    Raises:
        UserError: it is incomplete, or of a width that needs a config.json to tell its heads.
    """
    path = Path(path)
    with naming(parts.path):
        config = vision_config(parts.tensors, parts.known)
    if path.suffix:
        return write_state_dict(path, _to_open_clip(parts.tensors), metadata=parts.metadata)
    model = {"architectures": ["CLIPVisionModelWithProjection"], "model_type": "clip_vision_model"}
    with model_folder(path) as folder:
        write_part(folder, parts.tensors, {**model, **config}, stem=TEXT_STEMS[0], metadata=parts.metadata)
    return path


def vision_config(tensors: StateDict, known: Json) -> Json:
    """Values of transformers' CLIPVisionConfig for weights in its names.

    Raises:
        UserError: a weight that tells a size is missing, or the heads cannot be told.
    """
    for key, dims in SIZED_BY.items():
        if key not in tensors or tensors[key].dim() != dims:
            raise UserError(f"got an image encoder without a whole {key}, expected all of it: download it again")
    width, _, patch, _ = tensors["vision_model.embeddings.patch_embedding.weight"].shape
    positions = tensors["vision_model.embeddings.position_embedding.weight"].shape[0]
    heads, activation = KNOWN_WIDTHS.get(width, (None, "gelu"))
    heads = known.get("num_attention_heads", heads)
    if heads is None:
        raise UserError(
            f"got an image encoder of width {width}, whose heads no tensor tells: put its config.json beside it"
        )
    activation = known.get("hidden_act", activation)
    if type(heads) is not int or heads < 1 or width % heads or activation not in TEXT_ACTIVATIONS:
        raise UserError(
            f"got {heads!r} heads and hidden_act {activation!r} of an image encoder of width {width}, expected a "
            f"divisor and one of {', '.join(TEXT_ACTIVATIONS)}: correct its config.json"
        )
    layers = {m[1] for key in tensors if (m := re.match(r"vision_model\.encoder\.layers\.(\d+)\.", key))}
    return {
        "hidden_size": width,
        "intermediate_size": tensors["vision_model.encoder.layers.0.mlp.fc1.weight"].shape[0],
        "projection_dim": tensors[PROJECTION].shape[0],
        "num_hidden_layers": len(layers),
        "num_attention_heads": heads,
        "hidden_act": activation,
        "patch_size": patch,
        "image_size": round((positions - 1) ** 0.5) * patch,
    }


def clip_pixels(
    picture: Image.Image,
    size: int,
    *,
    fit: str = "crop",
    mean: Sequence[float] = MEAN,
    std: Sequence[float] = STD,
) -> Tensor:
    """Pixel values (1, 3, size, size) of a picture, as transformers makes them with PIL.

    Args:
        mean, std: of every channel, of a range of 1.
        fit: "crop" its middle, "squash" it to a square, or "pad" it to one with black.
    """
    picture, (width, height) = picture.convert("RGB"), picture.size
    if fit == "pad":
        side = max(width, height)
        square = Image.new("RGB", (side, side))
        square.paste(picture, ((side - width) // 2, (side - height) // 2))
        picture, (width, height) = square, square.size
    short = min(width, height)
    target = (size, size) if fit == "squash" else (size * width // short, size * height // short)
    picture = picture.resize(target, Image.Resampling.BICUBIC)
    left, top = (target[0] - size) // 2, (target[1] - size) // 2
    pixels = np.asarray(picture.crop((left, top, left + size, top + size)), dtype=np.float32) / 255
    normalised = (torch.from_numpy(pixels) - torch.tensor(mean)) / torch.tensor(std)
    return normalised.permute(2, 0, 1)[None]


def _from_open_clip(tensors: StateDict) -> StateDict:
    renamed: StateDict = {}
    for key, tensor in tensors.items():
        key = key.removeprefix(VISUAL)
        for theirs, ours in OPEN_CLIP:
            key = key.replace(theirs, ours)
        if key == "proj":
            renamed[PROJECTION] = tensor.T.contiguous()
        elif "in_proj_" in key:  # queries, keys and values in one
            for name, part in zip(QKV, tensor.chunk(3), strict=True):
                renamed[key.replace("in_proj_", name)] = part
        else:
            renamed[key] = tensor
    return renamed


def _to_open_clip(tensors: StateDict) -> StateDict:
    """The inverse of `_from_open_clip`."""
    renamed: StateDict = {}
    for key, tensor in tensors.items():
        if key.endswith(("k_proj.weight", "k_proj.bias", "v_proj.weight", "v_proj.bias")):
            continue
        if QKV[0] in key:
            tensor = torch.cat([tensors[key.replace(QKV[0], name)] for name in QKV])
            key = key.replace(QKV[0], "in_proj_")
        elif key == PROJECTION:
            key, tensor = "proj", tensor.T.contiguous()
        for theirs, ours in OPEN_CLIP:
            key = key.replace(ours, theirs)
        renamed[VISUAL + key] = tensor
    return renamed
