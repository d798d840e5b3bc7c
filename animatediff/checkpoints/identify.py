"""What is this weight file? Its kind by its keys, its version and base by its shapes."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from animatediff.checkpoints import sizes
from animatediff.checkpoints.diffusers_json import TEXT_STEMS, UNET_STEM, VAE_STEM, Json, adapter_metadata
from animatediff.checkpoints.files import LoadedFile, StateDict, find_weights, read_json, read_state_dict
from animatediff.checkpoints.keymaps import LDM_TEXT, LDM_UNET, LDM_VAE, MOTION_MARK, motion_to_official
from animatediff.checkpoints.lora_keys import LORA_STEMS, lora_algorithms, lora_base, lora_targets, unsupported_lora
from animatediff.config.networks import ANIMATE_LCM, ANIMATE_LCM_I2V, SDXL_TURBO, Distillation, lightning
from animatediff.utils import UserError, naming

SD15_WIDTHS = (320, 640, 1280, 1280)
SDXL_WIDTHS = (320, 640, 1280)
SDXL_VERSIONS = ("sdxl-beta", "hotshot-xl")
EMBEDDING_WIDTHS = (768, 1024, 1280)  # of the text encoders of SD 1.x, SD 2.x, and SDXL's second
MOTION_KINDS = ("motion-module", "motion-adapter")
CONDITIONED_MOTION = {"pia": "pia", "animatelcm-i2v": "animatelcm"}  # with a network for a picture -> motion version


@dataclass(frozen=True)
class Kind:
    """`summary` completes "this is …"; `config` is the line that uses such a file, empty where nothing can."""

    summary: str
    needs: str = ""
    config: str = ""


KINDS: dict[str, Kind] = {
    "sd1-checkpoint": Kind(
        "an SD 1.x image model in one file",
        "nothing more; a motion module animates it",
        "dreambooth_path: {path}   # or as the base: --pretrained-model-path {path}",
    ),
    "diffusers-folder": Kind(
        "an SD 1.x image model as a diffusers folder",
        "nothing more; a motion module animates it",
        "dreambooth_path: {path}   # or as the base: --pretrained-model-path {path}",
    ),
    "motion-module": Kind("a motion module", "an {base} image model", "motion_module: {path}"),
    "motion-adapter": Kind(
        "a motion module in diffusers' MotionAdapter format", "an {base} image model", "motion_module: {path}"
    ),
    "motion-lora": Kind(
        "a MotionLoRA",
        "a v2 motion module, as all released ones do, unless it was trained on another",
        "motion_module_lora_configs: [{{path: {path}, alpha: 1.0}}]",
    ),
    "domain-adapter": Kind("a domain adapter", "the v3 motion module it was trained with", "adapter_lora_path: {path}"),
    "lora": Kind("a LoRA of an image model", "an SD 1.x image model", "lora_model_path: {path}"),
    "sparsectrl": Kind(
        "a SparseCtrl encoder",
        "a v3 motion module and images of some frames",
        "controlnet_path: {path}   # and controlnet_images: […], controlnet_image_indexs: […]",
    ),
    "sd1-unet": Kind(
        "the UNet of an SD 1.x image model", "its folder: give the folder that holds unet/, vae/ and text_encoder/"
    ),
    "vae": Kind("a VAE alone", "an SD 1.x image model, the place of whose VAE it takes", "vae_path: {path}"),
    "text-encoder": Kind("a CLIP text encoder alone", "the folder of its image model"),
    "textual-inversion": Kind(
        "a textual inversion (embedding)", "an SD 1.x image model, and its name in a prompt", "embeddings: [{path}]"
    ),
    "sd2-textual-inversion": Kind("a textual inversion for SD 2.x", "an SD 2.x base, here it is SD 1.x"),
    "sdxl-textual-inversion": Kind(
        "a textual inversion for SDXL", "an SDXL image model, and its name in a prompt", "embeddings: [{path}]"
    ),
    "sd1-inpainting": Kind("an inpainting or instruction model (its conv_in takes more than 4 channels)"),
    "sd2-checkpoint": Kind("an SD 2.x image model (OpenCLIP text, context of 1024)"),
    "sdxl-checkpoint": Kind(
        "an SDXL image model (or one made of it: Turbo, Lightning, Pony, Illustrious)",
        "nothing more; an SDXL-beta or Hotshot-XL motion module animates it",
        "pretrained_model_path: {path}   # or on another SDXL base: dreambooth_path: {path}",
    ),
    "dit-checkpoint": Kind("a diffusion transformer (FLUX, SD 3 or the like)"),
    "pia": Kind(
        "a PIA motion module", "an SD 1.x image model and a picture", "motion_module: {path}   # and pia.image: …"
    ),
    "animatelcm-i2v": Kind(
        "an AnimateLCM-I2V motion module",
        "an SD 1.x image model and a picture",
        "motion_module: {path}   # and i2v.image: …",
    ),
    "cameractrl": Kind(
        "a CameraCtrl camera encoder", "the v3 motion module", "camera: {{path: {path}, move: zoom_in}}"
    ),
    "controlnet": Kind("a ControlNet", "an SD 1.x image model and hints", "controlnet: {{path: {path}, images: …}}"),
    "ip-adapter": Kind(
        "an IP-Adapter",
        "an SD 1.x image model, its image encoder and pictures",
        "ip_adapter: {{path: {path}, images: …}}   # and image_encoder: …",
    ),
    "image-encoder": Kind("a CLIP vision model", "an IP-Adapter that was trained with it", "image_encoder: {path}"),
    "faceid": Kind("a FaceID adapter", "InsightFace's face recognition network, which is not part of this project"),
    "sdxl-ip-adapter": Kind("an IP-Adapter for SDXL", "an SDXL base, here it is SD 1.x"),
    "sd2-controlnet": Kind("a ControlNet for SD 2.x", "an SD 2.x base, here it is SD 1.x"),
    "sdxl-controlnet": Kind("a ControlNet for SDXL", "an SDXL base, here it is SD 1.x"),
    "control-lora": Kind("a Control-LoRA (low-rank differences of a ControlNet)"),
    "controlllite": Kind("a ControlLLLite"),
    "t2i-adapter": Kind("a T2I-Adapter"),
    "motionctrl": Kind("a MotionCtrl camera or trajectory file"),
    "fancyvideo": Kind("a FancyVideo motion module"),
    "sdxl-lora": Kind("a LoRA for SDXL", "an SDXL image model", "lora_model_path: {path}"),
    "unsupported-lora": Kind("a LoRA for another kind of network"),
    "unknown": Kind("no kind of file that is known here"),
}


@dataclass(frozen=True)
class FileInfo:
    """The findings about one file or folder.

    `kind` is a key of KINDS, `version` a motion version or a variant's name, `base` the model family it belongs to,
    `dtype` the weights' type or types, `notes` what reading it removed.
    """

    path: Path
    kind: str
    version: str | None
    base: str
    dtype: str
    num_tensors: int
    num_parameters: int
    positional_length: int | None
    metadata: dict[str, str]
    notes: tuple[str, ...] = ()
    candidates: tuple[str, ...] = ()  # of a motion module's version, where the file does not tell

    @property
    def summary(self) -> str:
        if self.kind == "unsupported-lora" and self.version:
            return self.version
        return KINDS[self.kind].summary

    @property
    def needs(self) -> str:
        return KINDS[self.kind].needs.format(base=self.base)

    @property
    def supported(self) -> bool:
        return bool(KINDS[self.kind].config)

    @property
    def distillation(self) -> Distillation | None:
        """How a distilled motion module or SDXL image model has to be sampled, which mostly its name alone tells."""
        name = self.path.name.lower()
        steps = re.search(r"lightning.*?(\d+)[-_ ]?step", name)
        if self.kind == "sdxl-checkpoint":
            turbo = SDXL_TURBO if re.search(r"sd_?xl[-_]turbo", name) else None
            return lightning(int(steps[1]), "SDXL") if steps else turbo
        if self.kind == "animatelcm-i2v":
            return ANIMATE_LCM_I2V
        if self.kind not in MOTION_KINDS:
            return None
        if self.version == "animatelcm" or "animatelcm" in name:
            return ANIMATE_LCM
        return lightning(int(steps[1])) if steps else None

    @property
    def config_line(self) -> str:
        """The line of a prompt config that uses the file, or why none does."""
        line = KINDS[self.kind].config.format(path=self.path)
        if self.kind in MOTION_KINDS and self.version is None:
            line += f"\nversion: {' or '.join(self.candidates)}   # the file does not tell"
        return line or f"none: {self.summary} cannot be used here"


def identify(path: str | Path) -> FileInfo:
    """Say what a weight file or model folder is; `kind` is "unknown" where nothing fits.

    Raises:
        UserError: the file cannot be read (missing, damaged, no weights, needs code to be executed).
    """
    path = Path(path)
    if path.is_dir():
        return _identify_folder(path)
    return _identify_file(path, read_state_dict(path))


def adapter_config(weights: Path) -> Json:
    """The config.json beside the weights of a diffusers motion adapter, empty where there is none."""
    path = weights.with_name("config.json")
    config = read_json(path) if path.is_file() else {}
    return config if config.get("_class_name") in ("MotionAdapter", "UNetMotionModel") else {}


def _identify_file(path: Path, file: LoadedFile) -> FileInfo:
    info = identify_tensors(file.tensors, file.metadata, path=path, notes=file.notes)
    if info.kind == "motion-adapter" and (config := adapter_config(file.path)):
        metadata = adapter_metadata(config) | file.metadata
        length = info.positional_length or config.get("motion_max_seq_length")
        return identify_tensors(file.tensors, metadata, path=path, notes=file.notes, length=length)
    return info


def identify_tensors(
    tensors: StateDict,
    metadata: Mapping[str, str] | None = None,
    *,
    path: Path,
    notes: tuple[str, ...] = (),
    length: int | None = None,
) -> FileInfo:
    """As `identify`, of a state dict as `read_state_dict` returns it.

    Args:
        length: frames of the positional encoding, where something other than the tensors tells.
    """
    metadata = dict(metadata or {})
    kind = next(name for name, fits in RULES if fits(tensors))
    length = length or sizes.positional_length(tensors)
    with naming(path):
        version = _version(kind, tensors, metadata, length)
    return FileInfo(
        path=path,
        kind=kind,
        version=version,
        base=_base(kind, tensors, version),
        **_totals(tensors),
        positional_length=length,
        metadata=metadata,
        notes=notes,
        candidates=sizes.candidate_versions(motion_part(tensors)) if kind in MOTION_KINDS else (),
    )


def _totals(tensors: StateDict) -> dict[str, Any]:
    return {
        "dtype": ", ".join(sorted({str(t.dtype).removeprefix("torch.") for t in tensors.values()})),
        "num_tensors": len(tensors),
        "num_parameters": sum(t.numel() for t in tensors.values()),
    }


def refusal(info: FileInfo, expected: str) -> UserError:
    """The error for a file of another kind than `expected` (with its article: "a motion module")."""
    advice = "choose another file"
    if info.supported:
        lines = [line.split("   #")[0] for line in info.config_line.splitlines()]
        advice = f"use it as {' and '.join(f'`{line}`' for line in lines)}"
    elif info.kind == "unknown":
        advice = "its keys are of no known format; choose another file"
    elif info.needs:
        advice = f"it needs {info.needs}"
    return UserError(f"{info.path}: this is {info.summary}, not {expected}: {advice}")


# --- rules, the first that fits decides ------------------------------------------------------------------------------


def _any(pattern: str) -> Callable[[StateDict], bool]:
    found = re.compile(pattern).search
    return lambda tensors: any(found(key) for key in tensors)


def _both(*rules: Callable[[StateDict], bool]) -> Callable[[StateDict], bool]:
    return lambda tensors: all(rule(tensors) for rule in rules)


def _shape(pattern: str, axis: int, wanted: Callable[[int], bool]) -> Callable[[StateDict], bool]:
    """Whether the first key that matches has a fitting size along `axis`."""
    found = re.compile(pattern).search

    def rule(tensors: StateDict) -> bool:
        tensor = next((t for key, t in tensors.items() if found(key)), None)
        return tensor is not None and tensor.dim() > axis and wanted(tensor.shape[axis])

    return rule


def motion_part(tensors: StateDict) -> StateDict:
    """The motion modules' entries in official names."""
    official = {motion_to_official(key.removeprefix("unet.")): tensor for key, tensor in tensors.items()}
    return {key: tensor for key, tensor in official.items() if MOTION_MARK in key}


def embedding_vectors(tensors: StateDict) -> Tensor | None:
    """The vectors (k, d) or (d,) of a textual inversion, None in any other file."""
    vectors = {key: t for key, t in tensors.items() if not key.startswith("string_to_token.")}
    if len(vectors) != 1:
        return vectors.get("clip_g") if vectors.keys() == {"clip_l", "clip_g"} else None
    ((key, tensor),) = vectors.items()
    named = key in ("emb_params", "clip_l") or key.startswith(("string_to_param.", "<"))
    fits = tensor.dim() in (1, 2) and (named or ("." not in key and tensor.shape[-1] in EMBEDDING_WIDTHS))
    return tensor if fits else None


def _is_embedding(width: int | None = None) -> Callable[[StateDict], bool]:
    """Whether it is a textual inversion, of this width."""

    def rule(tensors: StateDict) -> bool:
        vectors = embedding_vectors(tensors)
        return vectors is not None and width in (None, vectors.shape[-1])

    return rule


_CONTEXT_KEY = r"attn2[._]to_k(\.lora_A|\.lora_down|\.lora\.down|_lora\.down)?\.weight$"

_LORA = r"(lora_down|lora_up|lora_A|lora_B|lora_E|_lora\.down|_lora\.up|\.lora\.down|\.lora\.up|lora_linear_layer"
_LORA += r"|oft_diag|b?oft_[RSrs]|lambda_layer|[qp]_layer|vera_lambda_\w|hra_u)\b"
_ADAPTER = r"^(down_blocks|up_blocks|mid_block)\..*attentions.*\.processor\.to_\w+_lora\.(down|up)"


def _lora(fits: Callable[[set[str]], bool] = bool) -> Callable[[StateDict], bool]:
    """Whether it changes layers of our networks, and these fit."""

    def rule(tensors: StateDict) -> bool:
        targets = lora_targets(tensors)
        return bool(targets) and fits(targets)

    return rule


_HINT = _any(r"^(control_model\.)?input_hint_block\.|^controlnet_cond_embedding\.")
_IMAGE_KEY = r"(ip_adapter|adapter_modules)\.\d+\.to_k_ip\.weight$|attn2\.processor\.to_k_ip\.weight$"

# Before LoRAs: some of these have low-rank layers too.
CONDITION_RULES: tuple[tuple[str, Callable[[StateDict], bool]], ...] = (
    ("faceid", _any(r"^image_proj(_model)?\.perceiver_resampler\.|^ip_adapter\.\d+\.to_\w+_lora\.")),
    ("faceid", _both(_any(r"^image_proj(_model)?\.proj\.0\."), _any(r"^image_proj(_model)?\.norm\."))),
    ("sdxl-ip-adapter", _shape(_IMAGE_KEY, 1, lambda n: n == 2048)),
    ("ip-adapter", _any(r"^(image_proj|image_proj_model)\.|" + _IMAGE_KEY)),
    ("control-lora", _any(r"^lora_controlnet$")),
    ("controlllite", _any(r"^lllite_")),
    ("t2i-adapter", _any(r"^(adapter\.)?body\.\d+\.(block1|in_conv|resnets)\b|^style_embedding$")),
    ("sparsectrl", _both(_HINT, _any(r"motion_modules\."))),
    (
        "sdxl-controlnet",
        _both(_HINT, _any(r"^(control_model\.)?(label_emb|add_embedding|task_embedding|control_add_embedding)\b")),
    ),
    (
        "sd2-controlnet",
        _both(_HINT, _shape(r"^(control_model|mid_block).*attn2\.to_k\.weight$", 1, lambda n: n == 1024)),
    ),
    ("controlnet", _any(r"^(input_hint_block|controlnet_cond_embedding|controlnet_down_blocks|control_model)\.")),
    ("cameractrl", _any(r"^pose_encoder|^encoder_down_conv_blocks\.|qkv_merge\.")),
    ("motionctrl", _any(r"\.cc_projection\.|^omcm_state_dict\.")),
    ("fancyvideo", _any(r"^FancyVideo$|^(module\.)?fps_embedding\.")),
    ("image-encoder", _any(r"^(visual\.class_embedding$|vision_model\.embeddings\.class_embedding$)")),
)
RULES: tuple[tuple[str, Callable[[StateDict], bool]], ...] = (
    *CONDITION_RULES,
    ("unsupported-lora", _both(_any(_LORA), lambda tensors: unsupported_lora(tensors) is not None)),
    ("motion-lora", _lora(lambda targets: all("_motion_modules_" in target for target in targets))),
    ("sdxl-lora", _both(_lora(), lambda tensors: lora_base(tensors) == "SDXL")),
    ("domain-adapter", _both(_lora(lambda targets: not any("_motion_modules_" in t for t in targets)), _any(_ADAPTER))),
    ("lora", _lora()),
    ("unsupported-lora", _any(_LORA)),
    ("sd2-textual-inversion", _is_embedding(1024)),
    ("sdxl-textual-inversion", _both(_is_embedding(), _any(r"^clip_g$"))),
    ("sdxl-textual-inversion", _is_embedding(1280)),
    ("textual-inversion", _is_embedding()),
    ("animatelcm-i2v", _both(_any(r"motion_modules\."), _any(r"^(module\.)?img_encoder\."))),
    ("pia", _both(_any(r"motion_modules\."), _shape(r"^conv_in\.weight$", 1, lambda n: n > 4))),
    ("motion-module", _any(r"motion_modules\.\d+\.temporal_transformer\.|temporal_attentions\.\d+\.")),
    ("motion-adapter", _any(r"motion_modules\.\d+\.")),
    ("sdxl-checkpoint", _any(r"^conditioner\.embedders\.|label_emb\.|^add_embedding\.")),
    ("dit-checkpoint", _any(r"(joint_blocks|double_blocks|single_transformer_blocks)\.")),
    ("sd2-checkpoint", _any(r"^cond_stage_model\.model\.")),
    ("sd2-checkpoint", _both(_shape(_CONTEXT_KEY, 1, lambda n: n == 1024), lambda t: not _any(f"^{LDM_TEXT}")(t))),
    ("sd1-inpainting", _shape(r"(input_blocks\.0\.0|^conv_in)\.weight$", 1, lambda n: n > 4)),
    ("sd1-checkpoint", _any(rf"^{re.escape(LDM_UNET)}input_blocks\.")),
    ("sd1-unet", _any(r"^down_blocks\.\d+\.resnets\.\d+\.time_emb_proj\.")),
    ("vae", _any(rf"^({re.escape(LDM_VAE)})?(encoder|decoder)\.conv_in\.")),
    ("text-encoder", _any(r"^(text_model\.)?embeddings\.token_embedding\.")),
    ("unknown", lambda tensors: True),
)


def _version(kind: str, tensors: StateDict, metadata: dict[str, str], length: int | None) -> str | None:
    if kind in CONDITIONED_MOTION:
        return CONDITIONED_MOTION[kind]
    if kind in MOTION_KINDS:
        motion = motion_part(tensors)
        if kind == "motion-adapter":
            length = sizes.adapter_length(motion, length)
        return sizes.detect_version(motion, metadata, length=length)[0]
    if kind == "sparsectrl":
        return "scribble" if _any(r"^controlnet_cond_embedding\.conv_in\.")(tensors) else "rgb"
    if kind == "unsupported-lora":
        return unsupported_lora(tensors)
    if "lora" in kind:
        return ", ".join(sorted(lora_algorithms(tensors)))
    return None


def _base(kind: str, tensors: StateDict, version: str | None) -> str:
    """The model family, with the widths where they are not SD 1.5's."""
    sdxl_motion = kind in MOTION_KINDS and _unet_widths(tensors) == SDXL_WIDTHS
    if kind.startswith("sdxl") or version in SDXL_VERSIONS or sdxl_motion:
        return "SDXL"
    if kind.startswith("sd2"):
        return "SD 2.x"
    if kind in ("unknown", "dit-checkpoint"):
        return "unknown"
    widths = _unet_widths(tensors)
    return "SD 1.x" if not widths or widths == SD15_WIDTHS else f"SD 1.x layout of widths {', '.join(map(str, widths))}"


def _unet_widths(tensors: StateDict) -> tuple[int, ...]:
    tensors = motion_part(tensors) or tensors
    if any(key.startswith(LDM_UNET) for key in tensors):
        pattern = re.compile(rf"{re.escape(LDM_UNET)}input_blocks\.(\d+)\.0\.out_layers\.3\.bias")
    elif any(MOTION_MARK in key for key in tensors):
        pattern = re.compile(r"down_blocks\.(\d+)\.motion_modules\.0\.temporal_transformer\.norm\.bias")
    else:
        pattern = re.compile(r"down_blocks\.(\d+)\.resnets\.0\.conv1\.bias")
    found = {int(m[1]): t.shape[0] for key, t in tensors.items() if (m := pattern.fullmatch(key))}
    order = sorted(found)
    if any(key.startswith(LDM_UNET) for key in tensors):  # every level starts after a gap left by its downsampler
        order = [i for i in order if i - 1 not in found]
    return tuple(found[i] for i in order)


# --- folders ---------------------------------------------------------------------------------------------------------


def weight_files(path: str | Path) -> list[Path]:
    """The file itself, or the weight files of a diffusers folder's parts (UNet first) or of an adapter's folder.

    Raises:
        UserError: a folder without any.
    """
    path = Path(path)
    if not path.is_dir():
        return [path]
    parts = [(path / "unet", UNET_STEM, UNET_STEM), (path / "vae", VAE_STEM, VAE_STEM)]
    parts += [(path / name, *TEXT_STEMS) for name in ("text_encoder", "text_encoder_2")]
    if not (path / "unet").is_dir():
        parts = [(path, stem, stem) for stem in (UNET_STEM, *LORA_STEMS)] + [(path, *TEXT_STEMS)]
    if found := [weights for part in parts if (weights := find_weights(*part))]:
        return found
    name = read_json(path / "model_index.json").get("_class_name") if (path / "model_index.json").is_file() else None
    what = f"a {name} without unet/ weights" if name else "no model_index.json, no unet/ and no weights"
    raise UserError(f"got the folder {path} with {what}, expected a diffusers model: give a complete folder or a file")


def _identify_folder(path: Path) -> FileInfo:
    first, *others = weight_files(path)
    info = _identify_file(path, read_state_dict(first))
    if first.parent == path or info.kind not in ("sd1-unet", "sdxl-checkpoint", *MOTION_KINDS):
        return info
    sizes_of_all = _totals(
        {f"{p.parent.name}/{k}": t for p in (first, *others) for k, t in read_state_dict(p).tensors.items()}
    )
    kind = info.kind if info.kind == "sdxl-checkpoint" else "diffusers-folder"
    return replace(info, kind=kind, version=None, **sizes_of_all)
