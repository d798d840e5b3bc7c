"""One entry of a prompt config to the networks that run it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from animatediff.checkpoints.load import ImageModel, load_base, load_motion_module, load_personalised, load_vae
from animatediff.checkpoints.lora_files import read_lora
from animatediff.checkpoints.sparsectrl_files import load_sparsectrl
from animatediff.checkpoints.textual_inversion import load_textual_inversion
from animatediff.config.steering import Steering
from animatediff.models.lora import LoRAStack
from animatediff.models.lora_layers import AlphaRule
from animatediff.models.sparsectrl_encoder import SparseCtrl
from animatediff.models.tokenizer import Tokenizer
from animatediff.models.unet import UNet
from animatediff.models.vae import VAE
from animatediff.pipeline.model import Components, place, share_weights
from animatediff.pipeline.weights import CheckedEntry
from animatediff.utils import UserError, naming


class Assembler:
    """Loads entries one after the other. Every entry starts from the clean base; nothing of one reaches the next.

    Image models are read into float32 on the CPU and kept until another one is asked for. An entry's networks are
    twins on the same storage: LoRAs give theirs new weights, and moving to a device makes copies.

    The order is the official one: motion module, DreamBooth (these two touch different weights), kohya LoRA, domain
    adapter, MotionLoRAs. A VAE of its own replaces the image model's. LoRAs are summed in float32 and rounded once.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype):
        self.device, self.dtype = device, dtype
        self._base: tuple[Path | None, ImageModel | None] = (None, None)
        self._personal: tuple[tuple[Path, Path] | None, ImageModel | None] = (None, None)

    def assemble(self, checked: CheckedEntry) -> Components:
        """Load what an entry names.

        Raises:
            UserError: a file is incomplete, does not fit the others, or contradicts the inference config.
        """
        entry, files = checked.entry, checked.files
        image = self._image_model(files["pretrained_model_path"], files.get("dreambooth_path"))
        reports = [str(image.report)]
        if "vae_path" in files:
            vae, vae_report = load_vae(files["vae_path"], image)
            image = replace(image, vae=vae)
            reports.append(str(vae_report))
        if image.vae is None:
            raise UserError(
                f"got {image.report.path} without a VAE, expected one in it or in the base model: "
                "give a base with a VAE by --pretrained-model-path, or a VAE by vae_path"
            )
        if side := next((s for s in (entry.H, entry.W) if s % image.vae.config.downsampling), None):
            raise UserError(
                f"entry {entry.name}: got a side of {side} pixels, expected multiples of "
                f"{image.vae.config.downsampling}: change H or W"
            )
        with naming(f"entry {entry.name}"):
            image.text_encoder.check_clip_skip(entry.clip_skip)
        tokenizer = self._tokenizer(files)
        if tokenizer.vocab_size > (known := image.text_encoder.config.vocab_size):
            raise UserError(
                f"got {image.report.path} whose text encoder knows {known} tokens, expected the tokenizer's "
                f"{tokenizer.vocab_size}: use a model folder with its own tokenizer/"
            )
        unet, text_encoder = share_weights(image.unet), share_weights(image.text_encoder)
        if "motion_module" in files:
            unet, report = self._with_motion(checked, unet)
            reports.append(report)
        loras = LoRAStack(unet, text_encoder)
        lora_keys = {}
        for key, path, scale, rule in self._loras(checked):
            lora = read_lora(path, name=_unused_name(path, loras))
            lora_keys[lora.name] = key.partition("[")[0]
            reports.append(str(loras.add(lora, scale, alpha_rule=rule)))
        loras.merge()
        sparsectrl = None
        if "controlnet_path" in files:
            sparsectrl, report = self._sparsectrl(checked, image.unet, image.vae)
            reports.append(report)
        for i, embedding in enumerate(entry.embeddings):
            path = files[f"embeddings[{i}].path"]
            reports.append(str(load_textual_inversion(path, text_encoder, tokenizer, name=embedding.name)))
        schedule = checked.inference.build_schedule(image.schedule.prediction_type if image.schedule else None)
        return Components(
            unet=place(unet, self.device, self.dtype),
            vae=place(share_weights(image.vae), self.device, self.dtype),
            text_encoder=place(text_encoder, self.device, self.dtype),
            tokenizer=tokenizer,
            schedule=replace(schedule, timestep_spacing=checked.sampling.timestep_spacing),
            loras=loras,
            reports=tuple(reports),
            sampler=checked.sampling.sampler,
            windows=checked.windows,
            lora_keys=lora_keys,
            steering=Steering().changed(**entry.said()),
            travel=checked.travel,
            prompt_weighting=entry.prompt_weighting,
            clip_skip=entry.clip_skip,
            distillation=checked.distillation,
            sparsectrl=place(sparsectrl, self.device, self.dtype) if sparsectrl else None,
        )

    def _image_model(self, base_path: Path, personal_path: Path | None) -> ImageModel:
        if self._base[0] != base_path:
            self._base = self._personal = (None, None)  # before the next is read: two do not fit everywhere
            self._base = (base_path, load_base(base_path))
        base = self._base[1]
        assert base is not None
        if personal_path is None:
            return base
        if self._personal[0] != (base_path, personal_path):
            self._personal = (None, None)
            self._personal = ((base_path, personal_path), load_personalised(personal_path, base))
        assert self._personal[1] is not None
        return self._personal[1]

    def _with_motion(self, checked: CheckedEntry, unet: UNet) -> tuple[UNet, str]:
        entry = checked.entry
        unet, report = load_motion_module(
            unet,
            checked.files["motion_module"],
            version=checked.version,
            norm_over_frames=entry.norm_over_frames,
        )
        motion = unet.config.motion
        assert motion is not None
        checked.inference.check(motion)
        unet.config = unet.config.with_motion(replace(motion, max_frames=checked.max_frames or motion.max_frames))
        return unet, str(report)

    @staticmethod
    def _sparsectrl(checked: CheckedEntry, unet: UNet, vae: VAE) -> tuple[SparseCtrl, str]:
        encoder, report = load_sparsectrl(checked.files["controlnet_path"], unet, vae)
        config, motion = encoder.config, encoder.config.unet.motion
        assert motion is not None
        if checked.control is not None:
            with naming(checked.files["controlnet_config"]):
                checked.control.check(config)
        longest = max(motion.max_frames, checked.entry.max_frames)
        encoder.config = replace(config, unet=config.unet.with_motion(replace(motion, max_frames=longest)))
        return encoder, str(report)

    @staticmethod
    def _loras(checked: CheckedEntry) -> list[tuple[str, Path, float, AlphaRule]]:
        entry, files = checked.entry, checked.files
        scales = {"lora_model_path": entry.lora_alpha, "adapter_lora_path": entry.adapter_lora_scale}
        scales |= {
            f"motion_module_lora_configs[{i}].path": lora.alpha
            for i, lora in enumerate(entry.motion_module_lora_configs)
        }
        rules: dict[str, AlphaRule] = {"lora_model_path": entry.lora_alpha_rule}
        return [(key, files[key], scale, rules.get(key, "standard")) for key, scale in scales.items() if key in files]

    @staticmethod
    def _tokenizer(files: dict[str, Path]) -> Tokenizer:
        """A model folder's own tokenizer, of the personalised model before the base; else the bundled CLIP table."""
        for key in ("dreambooth_path", "pretrained_model_path"):
            if key in files and (folder := files[key] / "tokenizer").is_dir():
                return Tokenizer.from_folder(folder)
        return Tokenizer()


def _unused_name(path: Path, loras: LoRAStack) -> str:
    """The file's stem, numbered where the stack knows it already."""
    names = (path.stem if i == 1 else f"{path.stem}-{i}" for i in range(1, len(loras.names) + 2))
    return next(name for name in names if name not in loras.names)
