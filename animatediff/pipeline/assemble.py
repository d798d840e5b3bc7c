"""One request to the networks that run it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from animatediff.checkpoints.load import ImageModel, load_base, load_motion_module, load_personalised, load_vae
from animatediff.checkpoints.lora_files import read_lora
from animatediff.checkpoints.textual_inversion import load_bundled_embeddings, load_textual_inversion
from animatediff.config.networks import distilled_schedule
from animatediff.config.request import Request
from animatediff.config.spellings import called
from animatediff.features.registry import NETWORKS
from animatediff.models.lora import LoRAStack
from animatediff.models.lora_layers import AlphaRule
from animatediff.models.text import TextEncoder
from animatediff.models.tokenizer import END, Tokenizer
from animatediff.models.twins import share_weights
from animatediff.models.unet import UNet
from animatediff.pipeline.headers import Checked, Headers
from animatediff.pipeline.memory import FIXED, check_memory, place
from animatediff.pipeline.model import Model
from animatediff.utils import UserError, naming


class Assembler:
    """Loads requests one after the other. Every one starts from the clean base; nothing of one reaches the next.

    Image models are read on the CPU, in the type that they compute in or, where LoRAs or words are to be added, in
    float32; what a file holds in it stays mapped. They are kept until another one is asked for. A request's networks
    are twins on the same storage: LoRAs give theirs new weights, and moving to a device makes copies.

    The order is the official one: motion module, DreamBooth (these two touch different weights), kohya LoRA, domain
    adapter, MotionLoRAs. A VAE of its own replaces the image model's. LoRAs are summed in float32 and rounded once.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype):
        self.device, self.dtype = device, dtype
        self._base: tuple[tuple[Path, torch.dtype] | None, ImageModel | None] = (None, None)
        self._personal: tuple[tuple[Path, Path] | None, ImageModel | None] = (None, None)

    def assemble(self, checked: Checked) -> Model:
        """Load what a request names.

        Raises:
            UserError: a file is incomplete, does not fit the others, or contradicts the inference config.
        """
        memory = checked.request.memory
        check_memory(memory, self.device)
        model = self.load(checked)
        model.loras.merge()
        if memory.weights == "float8":
            model.loras.fixed = FIXED
        for network in model.modules():
            place(network, memory, self.device, self.dtype)
        return model

    def load(self, checked: Checked) -> Model:
        """The networks of a request, its LoRAs beside them, where their files are read. Raises: as `assemble`."""
        with naming(f"entry {checked.request.output.name}"):
            return self._load(checked)

    def _load(self, checked: Checked) -> Model:
        request, headers = checked.request, checked.headers
        paths = headers.paths
        m = request.model
        adds = m.loras or m.motion_loras or m.adapter or m.embeddings
        read_in = torch.float32 if adds else self.dtype
        image = self._image_model(paths["model.base"], paths.get("model.personalised"), read_in)
        reports = [str(image.report)]
        if "model.vae" in paths:
            vae, vae_report = load_vae(paths["model.vae"], image)
            image = replace(image, vae=vae)
            reports.append(str(vae_report))
        tokenizer, tokenizer_2 = self._tokenizer(paths, "tokenizer"), None
        encoders = [(image.text_encoder, tokenizer)]
        if image.text_encoder_2:
            tokenizer_2 = self._tokenizer(paths, "tokenizer_2", pad_token="!")
            encoders.append((image.text_encoder_2, tokenizer_2))
        _check_image_model(image, request, encoders)
        assert image.vae is not None
        text_encoder, text_encoder_2 = (e and share_weights(e) for e in (image.text_encoder, image.text_encoder_2))
        if "model.motion_module" in paths:
            unet, report = self._with_motion(request, headers, image.unet)
            reports.append(report)
        else:
            unet = share_weights(image.unet)
        second = text_encoder_2 and (text_encoder_2, tokenizer_2)
        loras, roles = LoRAStack(unet, text_encoder, text_encoder_2), {}
        for role, path, scale, rule in _loras(request, paths):
            lora = read_lora(path, name=_unused_name(path, loras))
            roles[lora.name] = role
            with naming(path):
                reports.append(str(loras.add(lora, scale, alpha_rule=rule)))
            reports += load_bundled_embeddings(lora, text_encoder, tokenizer, second=second)
        networks: dict[str, nn.Module] = {}
        for group, load in NETWORKS.items():
            if (loaded := load(request, headers, image, unet)) is not None:
                networks[group], report = loaded
                reports += report.splitlines()
        for i, embedding in enumerate(request.model.embeddings):
            path = paths[f"model.embeddings[{i}].path"]
            report = load_textual_inversion(path, text_encoder, tokenizer, second=second, name=embedding.name)
            reports.append(str(report))
        schedule = headers.inference.build_schedule(image.schedule, betas=headers.recipe(request).schedule)
        schedule = distilled_schedule(schedule, headers.distillation(request))
        return Model(
            unet=unet,
            vae=share_weights(image.vae),
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            schedule=schedule,
            loras=loras,
            lora_roles=roles,
            networks=networks,
            distillation=headers.distillation(request),
            reports=tuple(reports),
            text_encoder_2=text_encoder_2,
            tokenizer_2=tokenizer_2,
            memory=request.memory,
        )

    def _image_model(self, base_path: Path, personal_path: Path | None, dtype: torch.dtype) -> ImageModel:
        if self._base[0] != (base_path, dtype):
            self._base = self._personal = (None, None)  # before the next is read: two do not fit everywhere
            self._base = ((base_path, dtype), load_base(base_path, dtype=dtype))
        base = self._base[1]
        assert base is not None
        if personal_path is None:
            return base
        if self._personal[0] != (base_path, personal_path):
            self._personal = (None, None)
            self._personal = ((base_path, personal_path), load_personalised(personal_path, base))
        assert self._personal[1] is not None
        return self._personal[1]

    @staticmethod
    def _with_motion(request: Request, headers: Headers, unet: UNet) -> tuple[UNet, str]:
        unet, report = load_motion_module(
            unet,
            headers.paths["model.motion_module"],
            version=headers.version(request),
            norm_over_frames=request.model.norm_over_frames,
        )
        motion = unet.config.motion
        assert motion is not None
        headers.inference.check(motion)
        longest = headers.max_frames(request) or motion.max_frames
        unet.config = unet.config.with_motion(replace(motion, max_frames=longest))
        return unet, str(report)

    @staticmethod
    def _tokenizer(paths: dict[str, Path], name: str, *, pad_token: str = END) -> Tokenizer:
        """A model folder's own tokenizer, of the personalised model before the base; else the bundled CLIP table."""
        for option in ("model.personalised", "model.base"):
            if option in paths and (folder := paths[option] / name).is_dir():
                return Tokenizer.from_folder(folder)
        return Tokenizer(pad_token=pad_token)


def _check_image_model(
    image: ImageModel, request: Request, encoders: Sequence[tuple[TextEncoder | None, Tokenizer]]
) -> None:
    """Raises: UserError where it lacks what the request needs."""
    if image.vae is None:
        raise UserError(
            f"got {image.report.path} without a VAE, expected one in it or in the base model: "
            "give a base with a VAE by --pretrained-model-path, or a VAE by vae_path"
        )
    for name in ("height", "width"):
        if (side := getattr(request.size, name)) % (multiple := image.vae.config.downsampling):
            option = called(request, f"size.{name}")
            raise UserError(f"{option}: got a side of {side} pixels, expected multiples of {multiple}")
    for encoder, tokenizer in encoders:
        if encoder is None:
            continue
        encoder.check_clip_skip(request.prompts.clip_skip)
        if tokenizer.vocab_size > (known := encoder.config.vocab_size):
            raise UserError(
                f"got {image.report.path} whose text encoder knows {known} tokens, expected the tokenizer's "
                f"{tokenizer.vocab_size}: use a model folder with its own tokenizer/"
            )


def _loras(request: Request, paths: dict[str, Path]) -> list[tuple[str, Path, float, AlphaRule]]:
    """(option of `Request.model`, file, scale, rule of alpha) of every LoRA, in the official order."""
    m = request.model
    found: list[tuple[str, Path, float, AlphaRule]] = []
    for i, lora in enumerate(m.loras):
        scale = m.lora_scale if lora.scale is None else lora.scale
        found.append(("loras", paths[f"model.loras[{i}].path"], scale, m.lora_alpha_rule))
    if m.adapter:
        found.append(("adapter", paths["model.adapter"], m.adapter_scale, "standard"))
    for i, lora in enumerate(m.motion_loras):
        found.append(("motion_loras", paths[f"model.motion_loras[{i}].path"], lora.scale, "standard"))
    return found


def _unused_name(path: Path, loras: LoRAStack) -> str:
    """The file's stem, numbered where the stack knows it already."""
    names = (path.stem if i == 1 else f"{path.stem}-{i}" for i in range(1, len(loras.names) + 2))
    return next(name for name in names if name not in loras.names)
