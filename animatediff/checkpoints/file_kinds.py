"""The kinds of weight files: what each is, how it is told from its keys and shapes, and the line that uses it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from animatediff.checkpoints.files import StateDict
from animatediff.checkpoints.keymaps import LDM_TEXT, LDM_UNET, LDM_VAE, MOTION_MARK, motion_to_official
from animatediff.checkpoints.lora_keys import lora_base, lora_targets, unsupported_lora

Rule = Callable[[StateDict], bool]
EMBEDDING_WIDTHS = (768, 1024, 1280)  # of the text encoders of SD 1.x, SD 2.x, and SDXL's second


def _any(pattern: str) -> Rule:
    found = re.compile(pattern).search
    return lambda tensors: any(found(key) for key in tensors)


def _both(*rules: Rule) -> Rule:
    return lambda tensors: all(rule(tensors) for rule in rules)


def _either(*rules: Rule) -> Rule:
    return lambda tensors: any(rule(tensors) for rule in rules)


def _shape(pattern: str, axis: int, wanted: Callable[[int], bool]) -> Rule:
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
        clip_g = vectors.get("clip_g") if vectors.keys() == {"clip_l", "clip_g"} else None
        return clip_g if clip_g is not None and clip_g.dim() in (1, 2) else None
    ((key, tensor),) = vectors.items()
    named = key in ("emb_params", "clip_l") or key.startswith(("string_to_param.", "<"))
    fits = tensor.dim() in (1, 2) and (named or ("." not in key and tensor.shape[-1] in EMBEDDING_WIDTHS))
    return tensor if fits else None


def _is_embedding(width: int | None = None) -> Rule:
    """Whether it is a textual inversion, of this width."""

    def rule(tensors: StateDict) -> bool:
        vectors = embedding_vectors(tensors)
        return vectors is not None and width in (None, vectors.shape[-1])

    return rule


_CONTEXT_KEY = r"attn2[._]to_k(\.lora_A|\.lora_down|\.lora\.down|_lora\.down)?\.weight$"

_LORA = r"(lora_down|lora_up|lora_A|lora_B|lora_E|_lora\.down|_lora\.up|\.lora\.down|\.lora\.up|lora_linear_layer"
_LORA += r"|oft_diag|b?oft_[RSrs]|lambda_layer|[qp]_layer|vera_lambda_\w|hra_u)\b"
_ADAPTER = r"^(down_blocks|up_blocks|mid_block)\..*attentions.*\.processor\.to_\w+_lora\.(down|up)"


def _lora(fits: Callable[[set[str]], bool] = bool) -> Rule:
    """Whether it changes layers of our networks, and these fit."""

    def rule(tensors: StateDict) -> bool:
        targets = lora_targets(tensors)
        return bool(targets) and fits(targets)

    return rule


_HINT = _any(r"^(control_model\.)?input_hint_block\.|^controlnet_cond_embedding\.")
_IMAGE_KEY = r"(ip_adapter|adapter_modules)\.\d+\.to_k_ip\.weight$|attn2\.processor\.to_k_ip\.weight$"
_RESAMPLER = r"^image_proj(_model)?\.proj_in\.weight$"
_MOTION = _any(r"motion_modules\.")
_CAMERA = _any(r"^pose_encoder|^encoder_down_conv_blocks\.|qkv_merge\.")
_OTHER_VIDEO = _any(
    r"\.(temporal_transformer_blocks|temp_attentions|temp_convs|(spatial|temporal)_res_block|time_stack)\."
)
_UNUSED_HERE = "an SD 2.x base, here it is SD 1.x or SDXL"
_INSIGHT_FACE = "InsightFace's face recognition network, which is not part of this project"
_CONTROLNET = "controlnet: {{path: {path}, images: picture.png}}"
_IP_ADAPTER = "ip_adapter: {{path: {path}, images: picture.png}}\nimage_encoder: image_encoder"
_IMAGE_MODEL = "nothing more; a motion module animates it"


@dataclass(frozen=True)
class Kind:
    """A kind of weight file.

    Attributes:
        summary: completes "this is …".
        fits: whether a state dict is one.
        needs: what it is used with, or what it would take.
        config: the lines that use such a file, empty where nothing can; picture.png and the folder image_encoder stand
            for files of the reader's.
    """

    summary: str
    fits: Rule
    needs: str = ""
    config: str = ""


# The first that fits decides. What has something of another kind in it stands before that kind.
KINDS: dict[str, Kind] = {
    "faceid": Kind(
        "a FaceID adapter",
        _either(
            _any(r"^image_proj(_model)?\.perceiver_resampler\.|^ip_adapter\.\d+\.to_\w+_lora\."),
            _both(_any(r"^image_proj(_model)?\.proj\.0\."), _any(r"^image_proj(_model)?\.norm\.")),
        ),
        _INSIGHT_FACE,
    ),
    "instantid": Kind("InstantID's adapter", _shape(_RESAMPLER, 1, lambda n: n == 512), _INSIGHT_FACE),
    "pulid": Kind(
        "PuLID's adapter",
        _any(r"^(id_adapter(_attn_layers)?|pulid_(ca|encoder))\.|^image_proj(_model)?\.(id_embedding_)?mapping"),
        _INSIGHT_FACE,
    ),
    "photomaker": Kind(
        "PhotoMaker's adapter",
        _both(_any(r"^id_encoder\."), _any(r"^lora_weights\.")),
        "its own encoder of faces, which is not part of this project; use an IP-Adapter plus-face",
    ),
    "kolors-ip-adapter": Kind(
        "an IP-Adapter for Kolors",
        _both(_shape(_IMAGE_KEY, 1, lambda n: n == 2048), _shape(_RESAMPLER, 1, lambda n: n == 1024)),
        "Kolors, which is not part of this project; use an IP-Adapter for SDXL",
    ),
    "sdxl-ip-adapter": Kind(
        "an IP-Adapter for SDXL",
        _shape(_IMAGE_KEY, 1, lambda n: n == 2048),
        "an SDXL image model, its image encoder and pictures",
        _IP_ADAPTER,
    ),
    "ip-adapter": Kind(
        "an IP-Adapter",
        _any(r"^(image_proj|image_proj_model)\.|" + _IMAGE_KEY),
        "an SD 1.x image model, its image encoder and pictures",
        _IP_ADAPTER,
    ),
    "control-lora": Kind("a Control-LoRA (low-rank differences of a ControlNet)", _any(r"^lora_controlnet$")),
    "controlllite": Kind("a ControlLLLite", _any(r"^lllite_")),
    "t2i-adapter": Kind("a T2I-Adapter", _any(r"^(adapter\.)?body\.\d+\.(block1|in_conv|resnets)\b|^style_embedding$")),
    "sparsectrl": Kind(
        "a SparseCtrl encoder",
        _both(_HINT, _MOTION),
        "a v3 motion module and images of some frames",
        "controlnet_path: {path}\ncontrolnet_images: [picture.png]\ncontrolnet_image_indexs: [0]",
    ),
    "union-controlnet": Kind(
        "a union ControlNet (several kinds of hints in one network)",
        _both(_HINT, _any(r"^(control_model\.)?(task_embedding|control_add_embedding)\b")),
        "a network of its own, which is not part of this project; use a ControlNet for one kind of hint",
    ),
    "sdxl-controlnet": Kind(
        "a ControlNet for SDXL",
        _both(_HINT, _any(r"^(control_model\.)?(label_emb|add_embedding)\b")),
        "an SDXL image model and hints",
        _CONTROLNET,
    ),
    "sd2-controlnet": Kind(
        "a ControlNet for SD 2.x",
        _both(_HINT, _shape(r"^(control_model|mid_block).*attn2\.to_k\.weight$", 1, lambda n: n == 1024)),
        _UNUSED_HERE,
    ),
    "controlnet": Kind(
        "a ControlNet",
        _any(r"^(input_hint_block|controlnet_cond_embedding|controlnet_down_blocks|control_model)\."),
        "an SD 1.x image model and hints",
        _CONTROLNET,
    ),
    "cameractrl-svd": Kind(
        "CameraCtrl for Stable Video Diffusion",
        _both(_CAMERA, _OTHER_VIDEO),
        "another video model; CameraCtrl for AnimateDiff's v3 is what fits here",
    ),
    "cameractrl": Kind(
        "a CameraCtrl camera encoder",
        _CAMERA,
        "the v3 motion module",
        "camera: {{path: {path}, move: zoom_in}}",
    ),
    "motionctrl": Kind("a MotionCtrl camera or trajectory file", _any(r"\.cc_projection\.|^omcm_state_dict\.")),
    "hellomeme": Kind("a HelloMeme network", _any(r"(^|\.)reference_modules_(down|mid|up)\.")),
    "fancyvideo": Kind(
        "a FancyVideo motion module", _any(r"^FancyVideo$|^(module\.)?(fps|motion)_embedding\.linear\.")
    ),
    "image-encoder": Kind(
        "a CLIP vision model",
        _any(r"^(visual\.class_embedding|vision_model\.embeddings\.class_embedding|image_encoder\.0\.weight)$"),
        "an IP-Adapter that was trained with it",
        "image_encoder: {path}",
    ),
    "unsupported-lora": Kind(
        "a LoRA for another kind of network",
        _both(_any(_LORA), lambda t: unsupported_lora(t) is not None or not lora_targets(t)),
    ),
    "motion-lora": Kind(
        "a MotionLoRA",
        _lora(lambda targets: all("_motion_modules_" in target for target in targets)),
        "a v2 motion module, as all released ones do, unless it was trained on another",
        "motion_module_lora_configs: [{{path: {path}, alpha: 1.0}}]",
    ),
    "sdxl-lora": Kind(
        "a LoRA for SDXL",
        _both(_lora(), lambda t: lora_base(t) == "SDXL"),
        "an SDXL image model",
        "lora_model_path: {path}",
    ),
    "sd2-lora": Kind("a LoRA for SD 2.x", _both(_lora(), lambda t: lora_base(t) == "SD 2.x"), _UNUSED_HERE),
    "domain-adapter": Kind(
        "a domain adapter",
        _both(_lora(lambda targets: not any("_motion_modules_" in t for t in targets)), _any(_ADAPTER)),
        "the v3 motion module it was trained with",
        "adapter_lora_path: {path}",
    ),
    "lora": Kind("a LoRA of an image model", _lora(), "an SD 1.x image model", "lora_model_path: {path}"),
    "sd2-textual-inversion": Kind("a textual inversion for SD 2.x", _is_embedding(1024), _UNUSED_HERE),
    "sdxl-textual-inversion": Kind(
        "a textual inversion for SDXL",
        _either(_both(_is_embedding(), _any(r"^clip_g$")), _is_embedding(1280)),
        "an SDXL image model, and its name in a prompt",
        "embeddings: [{path}]",
    ),
    "textual-inversion": Kind(
        "a textual inversion (embedding)",
        _is_embedding(),
        "an SD 1.x image model, and its name in a prompt",
        "embeddings: [{path}]",
    ),
    "other-video-model": Kind(
        "a video model of another kind (Stable Video Diffusion, ModelScope or the like)", _OTHER_VIDEO
    ),
    "animatelcm-i2v": Kind(
        "an AnimateLCM-I2V motion module",
        _both(_MOTION, _any(r"^(module\.)?img_encoder\.")),
        "an SD 1.x image model and a picture",
        "motion_module: {path}\ni2v: {{image: picture.png}}",
    ),
    "pia": Kind(
        "a PIA motion module",
        _both(_MOTION, _shape(r"^conv_in\.weight$", 1, lambda n: n > 4)),
        "an SD 1.x image model and a picture",
        "motion_module: {path}\npia: {{image: picture.png}}",
    ),
    "motion-module": Kind(
        "a motion module",
        _any(r"motion_modules\.\d+\.temporal_transformer\.|temporal_attentions\.\d+\."),
        "an {base} image model",
        "motion_module: {path}",
    ),
    "motion-adapter": Kind(
        "a motion module in diffusers' MotionAdapter format",
        _any(r"motion_modules\.\d+\."),
        "an {base} image model",
        "motion_module: {path}",
    ),
    "kolors": Kind(
        "Kolors (SDXL's UNet with ChatGLM as text encoder)",
        _any(rf"^({re.escape(LDM_UNET)})?encoder_hid_proj\.weight$"),
        "ChatGLM, which is not part of this project; use an image model made from SDXL",
    ),
    "guided-lcm": Kind(
        "the UNet of a latent consistency model that is told its guidance",
        _any(r"(^|\.)time_embed(ding)?\.cond_proj\."),
        "a UNet with an input for it, which is not part of this project; use the LCM-LoRA of the same authors",
    ),
    "sdxl-checkpoint": Kind(
        "an SDXL image model (or one made of it: Turbo, Lightning, Pony, Illustrious)",
        _any(r"^conditioner\.embedders\.|label_emb\.|^add_embedding\."),
        "nothing more; an SDXL-beta or Hotshot-XL motion module animates it",
        "pretrained_model_path: {path}   # or on another SDXL base: dreambooth_path: {path}",
    ),
    "dit-checkpoint": Kind(
        "a diffusion transformer (FLUX, SD 3 or the like)",
        _any(r"(joint_blocks|double_blocks|single_transformer_blocks)\."),
    ),
    "sd2-checkpoint": Kind(
        "an SD 2.x image model (OpenCLIP text, context of 1024)",
        _either(
            _any(r"^cond_stage_model\.model\."),
            _both(_shape(_CONTEXT_KEY, 1, lambda n: n == 1024), lambda t: not _any(f"^{LDM_TEXT}")(t)),
        ),
    ),
    "sd1-inpainting": Kind(
        "an inpainting or instruction model (its conv_in takes more than 4 channels)",
        _shape(r"(input_blocks\.0\.0|^conv_in)\.weight$", 1, lambda n: n > 4),
    ),
    "sd1-checkpoint": Kind(
        "an SD 1.x image model in one file",
        _any(rf"^{re.escape(LDM_UNET)}input_blocks\."),
        _IMAGE_MODEL,
        "dreambooth_path: {path}   # or as the base: --pretrained-model-path {path}",
    ),
    "sd1-unet": Kind(
        "the UNet of an SD 1.x image model",
        _any(r"^down_blocks\.\d+\.resnets\.\d+\.time_emb_proj\."),
        "text encoder and VAE of a base model",
        "dreambooth_path: {path}",
    ),
    "vae": Kind(
        "a VAE alone",
        _any(rf"^({re.escape(LDM_VAE)})?(encoder|decoder)\.conv_in\."),
        "an SD 1.x image model, the place of whose VAE it takes",
        "vae_path: {path}",
    ),
    "text-encoder": Kind(
        "a CLIP text encoder alone",
        _any(r"^(text_model\.)?embeddings\.token_embedding\."),
        "the folder of its image model",
    ),
    "diffusers-folder": Kind(
        "an SD 1.x image model as a diffusers folder",
        lambda tensors: False,  # told by what is in the folder
        _IMAGE_MODEL,
        "dreambooth_path: {path}   # or as the base: --pretrained-model-path {path}",
    ),
    "rife": Kind(
        "RIFE (frames between frames)",
        _any(r"^block0\.conv0\.0\.0\.weight$"),
        config="finish: {{interpolate: 2, interpolator: {path}}}",
    ),
    "tiny-decoder": Kind(
        "a tiny autoencoder (TAESD)",
        _any(r"^decoder\.layers\.2\.conv\.0\.weight$|^3\.conv\.0\.weight$"),
        "models/VAE-approx/, where the page finds it for its previews",
    ),
    "unknown": Kind("no kind of file that is known here", lambda tensors: True),
}
