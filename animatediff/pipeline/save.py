"""A pipeline's networks as files that configs can name."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import nn

from animatediff.checkpoints.distilled import distillation_metadata
from animatediff.checkpoints.export import save_image_model, save_motion_module
from animatediff.checkpoints.motion_condition_files import motion_condition_tensors
from animatediff.checkpoints.textual_inversion import save_words
from animatediff.config.inference_yaml import OF_IMAGES
from animatediff.config.networks import distilled_schedule
from animatediff.config.request import Request
from animatediff.config.settings import dump_yaml
from animatediff.models.text import TextEncoder
from animatediff.models.tokenizer import Tokenizer
from animatediff.models.twins import share_weights
from animatediff.pipeline.model import Model
from animatediff.utils import UserError, replacing


def save_model(model: Model, folder: Path, request: Request | None = None) -> Path:
    """Write `image_model.safetensors`, `motion_module.safetensors` and a `config.yaml` that names them.

    The config has the size and the sampler of `request`, if there is one.

    LoRAs are written as they are merged, at their present scales, added words as textual inversions. The files say how
    they have to be sampled, if they were distilled to few steps. ControlNets, IP-Adapters and other networks that are
    used as they were read are in their own files and stay there.

    A noise schedule that is not their family's, as an inference YAML may ask for, is written as such a file.

    Raises:
        UserError: the folder is a file, or cannot be written to.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"got {folder}, which is a file, expected a folder: choose another")
    folder = folder.absolute()  # a config's paths are those of whoever reads it, wherever that is
    folder.mkdir(parents=True, exist_ok=True)
    files = {"base": folder / "image_model.safetensors"}
    plain = replace(
        model,
        text_encoder=_without_words(model.text_encoder, model.tokenizer),
        text_encoder_2=_without_words(model.text_encoder_2, model.tokenizer_2),
    )
    told = distillation_metadata(model.distillation, motion_module=False)
    save_image_model(plain, files["base"], metadata=told)
    if model.unet.config.motion is not None:
        files["motion_module"] = folder / "motion_module.safetensors"
        picture = next((network for group, network in model.networks.items() if group in ("pia", "i2v")), None)
        condition = motion_condition_tensors(picture, model.unet) if picture else {}  # type: ignore[arg-type]
        told = distillation_metadata(model.distillation, motion_module=True)
        save_motion_module(model.unet, files["motion_module"], condition=condition, metadata=told)
    words = [{"path": str(path), "name": word} for word, path in save_words(model.text_encoders(), folder).items()]
    if own := _own_schedule(model):
        files["inference_config"] = folder / "inference.yaml"
        with replacing(files["inference_config"]) as temporary:
            temporary.write_text(dump_yaml({"noise_scheduler_kwargs": own}), encoding="utf-8")
    networks = {name: str(path) for name, path in files.items()} | ({"embeddings": words} if words else {})
    kept = {"size": ("height", "width"), "sampling": ("sampler", "timestep_spacing")}
    said = {group: {name: value for name in names if (value := getattr(getattr(request, group), name))}
            for group, names in kept.items() if request}  # fmt: skip
    entry = {"model": networks, "prompts": {"prompt": [""]}} | {
        group: values for group, values in said.items() if values
    }
    with replacing(folder / "config.yaml") as temporary:
        temporary.write_text(dump_yaml([entry]), encoding="utf-8")
    return folder


def _own_schedule(model: Model) -> dict[str, Any]:
    """What of the noise schedule neither the family of the networks nor the metadata of their files tell."""
    told = {name: getattr(model.schedule, name) for name in OF_IMAGES}
    usual = distilled_schedule(replace(model.recipe.schedule, **told), model.distillation)
    return {name: value for name, value in asdict(model.schedule).items() if value != getattr(usual, name)}


def _without_words(encoder: TextEncoder | None, tokenizer: Tokenizer | None) -> TextEncoder | None:
    """The same weights, without the vectors of added words."""
    if encoder is None or tokenizer is None or not tokenizer.own_words:
        return encoder
    plain = share_weights(encoder)
    embeddings, first = plain.text_model.embeddings, min(min(ids) for ids in tokenizer.own_words.values())
    embeddings.token_embedding = nn.Embedding.from_pretrained(embeddings.token_embedding.weight[:first])
    plain.config = replace(plain.config, vocab_size=first)
    return plain
