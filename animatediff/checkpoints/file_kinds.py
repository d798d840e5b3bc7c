"""The kinds of weight files: what each is, how it is told from its keys and shapes, and the line that uses it."""

from __future__ import annotations

import re
from dataclasses import dataclass

from animatediff.checkpoints.keymaps import LDM_TEXT, LDM_UNET, LDM_VAE
from animatediff.checkpoints.kind_rules import (
    Rule,
    any_key,
    both,
    either,
    is_embedding,
    is_lora,
    is_thinned,
    sized,
)
from animatediff.checkpoints.lora_keys import lora_base, lora_targets, unsupported_lora

_CONTEXT_KEY = r"attn2[._]to_k(\.lora_A|\.lora_down|\.lora\.down|_lora\.down)?\.weight$"

_LORA = r"(lora_down|lora_up|lora_A|lora_B|lora_E|_lora\.down|_lora\.up|\.lora\.down|\.lora\.up|lora_linear_layer"
_LORA += r"|oft_diag|b?oft_[RSrs]|lambda_layer|[qp]_layer|vera_lambda_\w|hra_u)\b"
_ADAPTER = r"^(down_blocks|up_blocks|mid_block)\..*attentions.*\.processor\.to_\w+_lora\.(down|up)"


_HINT = any_key(r"^(control_model\.)?input_hint_block\.|^controlnet_cond_embedding\.")
_IMAGE_KEY = r"(ip_adapter|adapter_modules)\.\d+\.to_k_ip\.weight$|attn2\.processor\.to_k_ip\.weight$"
_RESAMPLER = r"^image_proj(_model)?\.proj_in\.weight$"
_MOTION = any_key(r"motion_modules\.")
_SDXL = any_key(r"^conditioner\.embedders\.|label_emb\.|^add_embedding\.")
_CAMERA = any_key(r"^pose_encoder|^encoder_down_conv_blocks\.|qkv_merge\.")
_OTHER_VIDEO = any_key(
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
        either(
            any_key(r"^image_proj(_model)?\.perceiver_resampler\.|^ip_adapter\.\d+\.to_\w+_lora\."),
            both(any_key(r"^image_proj(_model)?\.proj\.0\."), any_key(r"^image_proj(_model)?\.norm\.")),
        ),
        _INSIGHT_FACE,
    ),
    "instantid": Kind("InstantID's adapter", sized(_RESAMPLER, 1, lambda n: n == 512), _INSIGHT_FACE),
    "pulid": Kind(
        "PuLID's adapter",
        any_key(r"^(id_adapter(_attn_layers)?|pulid_(ca|encoder))\.|^image_proj(_model)?\.(id_embedding_)?mapping"),
        _INSIGHT_FACE,
    ),
    "photomaker": Kind(
        "PhotoMaker's adapter",
        both(any_key(r"^id_encoder\."), any_key(r"^lora_weights\.")),
        "its own encoder of faces, which is not part of this project; use an IP-Adapter plus-face",
    ),
    "kolors-ip-adapter": Kind(
        "an IP-Adapter for Kolors",
        both(sized(_IMAGE_KEY, 1, lambda n: n == 2048), sized(_RESAMPLER, 1, lambda n: n == 1024)),
        "Kolors, which is not part of this project; use an IP-Adapter for SDXL",
    ),
    "sdxl-ip-adapter": Kind(
        "an IP-Adapter for SDXL",
        sized(_IMAGE_KEY, 1, lambda n: n == 2048),
        "an SDXL image model, its image encoder and pictures",
        _IP_ADAPTER,
    ),
    "ip-adapter": Kind(
        "an IP-Adapter",
        any_key(r"^(image_proj|image_proj_model)\.|" + _IMAGE_KEY),
        "an SD 1.x image model, its image encoder and pictures",
        _IP_ADAPTER,
    ),
    "control-lora": Kind("a Control-LoRA (low-rank differences of a ControlNet)", any_key(r"^lora_controlnet$")),
    "controlllite": Kind("a ControlLLLite", any_key(r"^lllite_")),
    "t2i-adapter": Kind(
        "a T2I-Adapter", any_key(r"^(adapter\.)?body\.\d+\.(block1|in_conv|resnets)\b|^style_embedding$")
    ),
    "sparsectrl": Kind(
        "a SparseCtrl encoder",
        both(_HINT, _MOTION),
        "a v3 motion module and images of some frames",
        "controlnet_path: {path}\ncontrolnet_images: [picture.png]\ncontrolnet_image_indexs: [0]",
    ),
    "union-controlnet": Kind(
        "a union ControlNet (several kinds of hints in one network)",
        both(_HINT, any_key(r"^(control_model\.)?(task_embedding|control_add_embedding)\b")),
        "a network of its own, which is not part of this project; use a ControlNet for one kind of hint",
    ),
    "sdxl-controlnet": Kind(
        "a ControlNet for SDXL",
        both(_HINT, any_key(r"^(control_model\.)?(label_emb|add_embedding)\b")),
        "an SDXL image model and hints",
        _CONTROLNET,
    ),
    "sd2-controlnet": Kind(
        "a ControlNet for SD 2.x",
        both(_HINT, sized(r"^(control_model|mid_block).*attn2\.to_k\.weight$", 1, lambda n: n == 1024)),
        _UNUSED_HERE,
    ),
    "controlnet": Kind(
        "a ControlNet",
        any_key(r"^(input_hint_block|controlnet_cond_embedding|controlnet_down_blocks|control_model)\."),
        "an SD 1.x image model and hints",
        _CONTROLNET,
    ),
    "cameractrl-svd": Kind(
        "CameraCtrl for Stable Video Diffusion",
        both(_CAMERA, _OTHER_VIDEO),
        "another video model; CameraCtrl for AnimateDiff's v3 is what fits here",
    ),
    "cameractrl": Kind(
        "a CameraCtrl camera encoder",
        _CAMERA,
        "the v3 motion module",
        "camera: {{path: {path}, move: zoom_in}}",
    ),
    "motionctrl": Kind("a MotionCtrl camera or trajectory file", any_key(r"\.cc_projection\.|^omcm_state_dict\.")),
    "hellomeme": Kind("a HelloMeme network", any_key(r"(^|\.)reference_modules_(down|mid|up)\.")),
    "fancyvideo": Kind(
        "a FancyVideo motion module", any_key(r"^FancyVideo$|^(module\.)?(fps|motion)_embedding\.linear\.")
    ),
    "image-encoder": Kind(
        "a CLIP vision model",
        any_key(r"^(visual\.class_embedding|vision_model\.embeddings\.class_embedding|image_encoder\.0\.weight)$"),
        "an IP-Adapter that was trained with it",
        "image_encoder: {path}",
    ),
    "unsupported-lora": Kind(
        "a LoRA for another kind of network",
        both(any_key(_LORA), lambda t: unsupported_lora(t) is not None or not lora_targets(t)),
    ),
    "motion-lora": Kind(
        "a MotionLoRA",
        is_lora(lambda targets: all("_motion_modules_" in target for target in targets)),
        "a v2 motion module, as all released ones do, unless it was trained on another",
        "motion_module_lora_configs: [{{path: {path}, alpha: 1.0}}]",
    ),
    "sdxl-lora": Kind(
        "a LoRA for SDXL",
        both(is_lora(), lambda t: lora_base(t) == "SDXL"),
        "an SDXL image model",
        "lora_model_path: {path}",
    ),
    "sd2-lora": Kind("a LoRA for SD 2.x", both(is_lora(), lambda t: lora_base(t) == "SD 2.x"), _UNUSED_HERE),
    "domain-adapter": Kind(
        "a domain adapter",
        both(is_lora(lambda targets: not any("_motion_modules_" in t for t in targets)), any_key(_ADAPTER)),
        "the v3 motion module it was trained with",
        "adapter_lora_path: {path}   # or, of an image model alone: lora_model_path: {path}",
    ),
    "lora": Kind("a LoRA of an image model", is_lora(), "an SD 1.x image model", "lora_model_path: {path}"),
    "sd2-textual-inversion": Kind("a textual inversion for SD 2.x", is_embedding(1024), _UNUSED_HERE),
    "sdxl-textual-inversion": Kind(
        "a textual inversion for SDXL",
        either(both(is_embedding(), any_key(r"^clip_g$")), is_embedding(1280)),
        "an SDXL image model, and its name in a prompt",
        "embeddings: [{path}]",
    ),
    "textual-inversion": Kind(
        "a textual inversion (embedding)",
        is_embedding(),
        "an SD 1.x image model, and its name in a prompt",
        "embeddings: [{path}]",
    ),
    "other-video-model": Kind(
        "a video model of another kind (Stable Video Diffusion, ModelScope or the like)", _OTHER_VIDEO
    ),
    "animatelcm-i2v": Kind(
        "an AnimateLCM-I2V motion module",
        both(_MOTION, any_key(r"^(module\.)?img_encoder\.")),
        "an SD 1.x image model and a picture",
        "motion_module: {path}\ni2v: {{image: picture.png}}",
    ),
    "pia": Kind(
        "a PIA motion module",
        both(_MOTION, sized(r"^conv_in\.weight$", 1, lambda n: n > 4)),
        "an SD 1.x image model and a picture",
        "motion_module: {path}\npia: {{image: picture.png}}",
    ),
    "motion-module": Kind(
        "a motion module",
        any_key(r"motion_modules\.\d+\.temporal_transformer\.|temporal_attentions\.\d+\."),
        "an {base} image model",
        "motion_module: {path}",
    ),
    "motion-adapter": Kind(
        "a motion module in diffusers' MotionAdapter format",
        any_key(r"motion_modules\.\d+\."),
        "an {base} image model",
        "motion_module: {path}",
    ),
    "kolors": Kind(
        "Kolors (SDXL's UNet with ChatGLM as text encoder)",
        any_key(rf"^({re.escape(LDM_UNET)})?encoder_hid_proj\.weight$"),
        "ChatGLM, which is not part of this project; use an image model made from SDXL",
    ),
    "guided-lcm": Kind(
        "the UNet of a latent consistency model that is told its guidance",
        any_key(r"(^|\.)time_embed(ding)?\.cond_proj\."),
        "a UNet with an input for it, which is not part of this project; use the LCM-LoRA of the same authors",
    ),
    "inpainting": Kind(
        "an inpainting or instruction model (its conv_in takes more than 4 channels)",
        sized(r"(input_blocks\.0\.0|^conv_in)\.weight$", 1, lambda n: n > 4),
        "further input channels, which are not part of this project; `mask` inpaints with any other model",
    ),
    "playground": Kind(
        "Playground 2.5 (SDXL's networks on other noise levels and latents)",
        any_key(r"^edm_(mean|std)$"),
        "its own sampling, which is not part of this project; use an image model made from SDXL",
    ),
    "thinned-sdxl": Kind(
        "a smaller network made from SDXL (SSD-1B, Vega, KOALA)",
        both(_SDXL, is_thinned),
        "another UNet, which is not part of this project; use an image model made from SDXL",
    ),
    "sdxl-unet": Kind(
        "the UNet of an SDXL image model",
        both(_SDXL, lambda tensors: not any_key(r"^(conditioner|first_stage_model)\.")(tensors)),
        "text encoders and VAE of an SDXL base",
        "dreambooth_path: {path}",
    ),
    "sdxl-checkpoint": Kind(
        "an SDXL image model (or one made of it: Turbo, Lightning, Pony, Illustrious)",
        _SDXL,
        "nothing more; an SDXL-beta or Hotshot-XL motion module animates it",
        "pretrained_model_path: {path}   # or on another SDXL base: dreambooth_path: {path}",
    ),
    "dit-checkpoint": Kind(
        "a diffusion transformer (FLUX, SD 3 or the like)",
        any_key(r"(joint_blocks|double_blocks|single_transformer_blocks)\."),
    ),
    "sd2-checkpoint": Kind(
        "an SD 2.x image model (OpenCLIP text, context of 1024)",
        either(
            any_key(r"^cond_stage_model\.model\."),
            both(sized(_CONTEXT_KEY, 1, lambda n: n == 1024), lambda t: not any_key(f"^{LDM_TEXT}")(t)),
        ),
    ),
    "sd1-checkpoint": Kind(
        "an SD 1.x image model in one file",
        any_key(rf"^{re.escape(LDM_UNET)}input_blocks\."),
        _IMAGE_MODEL,
        "dreambooth_path: {path}   # or as the base: --pretrained-model-path {path}",
    ),
    "sd1-unet": Kind(
        "the UNet of an SD 1.x image model",
        any_key(r"^down_blocks\.\d+\.resnets\.\d+\.time_emb_proj\."),
        "text encoder and VAE of a base model",
        "dreambooth_path: {path}",
    ),
    "vae": Kind(
        "a VAE alone",
        any_key(rf"^({re.escape(LDM_VAE)})?(encoder|decoder)\.conv_in\."),
        "an SD 1.x image model, the place of whose VAE it takes",
        "vae_path: {path}",
    ),
    "text-encoder": Kind(
        "a CLIP text encoder alone",
        any_key(r"^(text_model\.)?embeddings\.token_embedding\."),
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
        any_key(r"^block0\.conv0\.0\.0\.weight$"),
        config="finish: {{interpolate: 2, interpolator: {path}}}",
    ),
    "tiny-decoder": Kind(
        "a tiny autoencoder (TAESD)",
        any_key(r"^decoder\.layers\.2\.conv\.0\.weight$|^3\.conv\.0\.weight$"),
        "models/VAE-approx/, where the page finds it for its previews",
    ),
    "unknown": Kind("no kind of file that is known here", lambda tensors: True),
}
