"""Network sizes: one frozen dataclass per module, and the table of motion-module versions."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from animatediff.config.settings import Bool, Float, Int, options


@dataclass(frozen=True)
class MotionConfig:
    """A set of motion modules (AnimateDiff, arXiv 2307.04725, sec. 4.2).

    `resnet_norm_over_frames` belongs here although it changes image layers: v1 modules were trained
    inside a UNet whose ResNet GroupNorms pooled their statistics over the frames of a clip.
    """

    version: str = "v3"
    max_frames: int = 32  # longest clip seen in training (length of the positional encoding)
    mid_block: bool = False
    resnet_norm_over_frames: bool = False
    num_heads: int = 8
    num_transformer_blocks: int = 1
    attentions_per_block: int = 2
    resolutions: tuple[int, ...] = (1, 2, 4, 8)  # down-sampling factors that carry motion modules
    up_block_modules: bool = True  # SparseCtrl's encoder has them in the down blocks only
    norm_over_frames: bool = False  # the module's own GroupNorm: False official SD 1.5; True as diffusers runs it
    single_frames: bool = True  # whether the modules do anything to a clip of one frame; Hotshot-XL's do not
    temporal: Literal["attention", "convolution"] = "attention"  # what mixes the frames; convolution is for ablations
    positional_encoding: bool = True  # of attention; a convolution knows the order of its frames without

    @property
    def tells_positions(self) -> bool:
        """Whether a frame's number in the clip is told to the network."""
        return self.temporal == "attention" and self.positional_encoding


# Rows of differences between released versions; everything else is the same network.
MOTION_VERSIONS: dict[str, MotionConfig] = {
    "v1": MotionConfig(version="v1", max_frames=24, resnet_norm_over_frames=True),
    "v2": MotionConfig(version="v2", max_frames=32, mid_block=True),
    "v3": MotionConfig(version="v3", max_frames=32),
    "animatelcm": MotionConfig(version="animatelcm", max_frames=64, mid_block=True),
    "pia": MotionConfig(version="pia", max_frames=32, resnet_norm_over_frames=True),
    "sparsectrl": MotionConfig(version="sparsectrl", max_frames=32, attentions_per_block=1, up_block_modules=False),
    "sdxl-beta": MotionConfig(version="sdxl-beta", max_frames=32, resolutions=(1, 2, 4), norm_over_frames=True),
    "hotshot-xl": MotionConfig(
        version="hotshot-xl", max_frames=24, resolutions=(1, 2, 4), resnet_norm_over_frames=True, single_frames=False
    ),
}


@dataclass(frozen=True)
class UNetConfig:
    """UNet of Stable Diffusion; the defaults are SD 1.5. `motion=None` is the plain image model.

    Heads are a number (SD 1.x) or a width (SDXL, SD 2.x). Blocks of spatial transformers are one number for all levels
    or one for each, the middle block having as many as the last.
    """

    in_channels: int = 4
    out_channels: int = 4
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    attention_levels: tuple[bool, ...] = (True, True, True, False)  # per level, highest resolution first
    layers_per_block: int = 2
    context_dim: int = 768
    num_heads: int = 8
    num_transformer_blocks: int | tuple[int, ...] = 1
    norm_num_groups: int = 32
    linear_projection: bool = False  # spatial transformers' proj_in/proj_out: 1x1 convolution or Linear
    motion: MotionConfig | None = None
    head_dim: int = 0  # width of a head at all levels, in place of num_heads (SDXL: 64)
    added_channels: int = 0  # pooled text and the features of the picture's sizes (SDXL: 2816); 0: there is neither

    def heads(self, channels: int) -> int:
        """Attention heads of a layer of this width."""
        return channels // self.head_dim if self.head_dim else self.num_heads

    def transformer_blocks(self, level: int) -> int:
        """Blocks of a level's spatial transformers, 0 where it has none; level -1 is the middle block."""
        blocks = self.num_transformer_blocks
        of_level = blocks if isinstance(blocks, int) else blocks[level]
        return of_level if level < 0 or self.attention_levels[level] else 0

    def with_motion(self, motion: MotionConfig | None) -> UNetConfig:
        return replace(self, motion=motion)


@dataclass(frozen=True)
class SparseCtrlConfig:
    """SparseCtrl (arXiv 2311.16933). `unet` sizes its encoder, which is that of a UNet with motion modules.

    `pixel_channels` are the widths of the CNN that brings pixels to the size of latents, each after the first at half
    the size; without, the condition is latents.
    """

    unet: UNetConfig = UNetConfig(motion=MOTION_VERSIONS["sparsectrl"])
    condition_channels: int = 4  # without the mask
    pixel_channels: tuple[int, ...] = ()

    @property
    def kind(self) -> str:
        return "scribble" if self.pixel_channels else "rgb"


@dataclass(frozen=True)
class ControlNetConfig:
    """ControlNet (arXiv 2302.05543). `unet` sizes its encoder; it never has motion modules.

    `hint_widths` are those of the CNN that brings hints to the size of latents, each after the first at half the size.
    `pooled`: every residual is its mean over the picture, and the unconditional part gets none (the shuffle model).
    """

    unet: UNetConfig = UNetConfig()
    hint_channels: int = 3
    hint_widths: tuple[int, ...] = (16, 32, 96, 256)
    pooled: bool = False
    bgr: bool = False  # order of the hint's channels it was trained with


@dataclass(frozen=True)
class IPAdapterConfig:
    """IP-Adapter (arXiv 2308.06721); the defaults are SD 1.5's base. Width, heads and depth are plus's resampler's."""

    variant: Literal["base", "plus", "full"] = "base"
    encoder_width: int = 1024  # base: of the image encoder's embeddings; plus and full: of its hidden states
    context_dim: int = 768
    layer_widths: tuple[int, ...] = (*(320,) * 2, *(640,) * 2, *(1280,) * 5, *(640,) * 3, *(320,) * 3, 1280)
    tokens: int = 4  # that a picture becomes; full: as many as the encoder has
    width: int = 768
    num_heads: int = 12
    depth: int = 4


@dataclass(frozen=True)
class CameraConfig:
    """CameraCtrl (arXiv 2404.02101); the defaults are the official file's.

    `merge_widths` are those of the motion modules it is merged into, on the way down and then up.
    """

    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    merge_widths: tuple[int, ...] = (320, 320, 640, 640, *(1280,) * 10, *(640,) * 3, *(320,) * 3)
    downsampling: int = 8  # pixels per latent and side
    num_heads: int = 8
    max_frames: int = 16  # longest clip seen in training


@dataclass(frozen=True)
class VAEConfig:
    """AutoencoderKL (Rombach et al. 2022); the defaults are SD 1.x."""

    in_channels: int = 3
    latent_channels: int = 4
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    scaling_factor: float = 0.18215

    @property
    def downsampling(self) -> int:
        """Pixels per latent cell and side (8 for SD)."""
        return 2 ** (len(self.block_out_channels) - 1)


@dataclass(frozen=True)
class TextConfig:
    """CLIP text model (Radford et al. 2021); the defaults are ViT-L/14."""

    vocab_size: int = 49408
    width: int = 768
    layers: int = 12
    num_heads: int = 12
    mlp_width: int = 3072
    max_length: int = 77  # tokens of one chunk, start and end tokens included
    activation: str = "quick_gelu"
    projection_width: int = 0  # of the pooled vector (SDXL's second encoder); 0 leaves it as it is
    end_token_id: int = 49407  # whose state is the pooled vector


@options
class ScheduleConfig:
    """The noise schedule; the defaults are those all SD 1.5 motion modules were trained with (SDXL's: see RECIPES)."""

    num_train_timesteps: Int = 1000
    beta_start: Float = 0.00085
    beta_end: Float = 0.012
    beta_schedule: str = "linear"  # or "scaled_linear" (linear in sqrt(beta))
    prediction_type: str = "epsilon"  # or "v_prediction", "sample"
    steps_offset: Int = 1
    timestep_spacing: str = "leading"
    set_alpha_to_one: Bool = True
    clip_sample: Bool = False
    lcm_timesteps: Int = 100  # of which consistency models for video were distilled on, for the spacing lcm
    rescale_betas_zero_snr: Bool = False  # the last timestep is pure noise; for v_prediction and sample


@dataclass(frozen=True)
class Distillation:
    """How a motion module, an image model or a LoRA that was distilled to few steps has to be sampled."""

    name: str
    sampler: str
    timestep_spacing: str
    steps: int  # where nobody says
    possible_steps: tuple[int, ...]
    guidance_scale: float  # where nobody says
    max_guidance_scale: float = 2.0  # above, the contrast burns out
    otherwise: str = ", or set the motion module's `version` to sample it as you like"
    beta_end: float | None = None  # of the noise schedule, where it is another one
    lcm_timesteps: int | None = None  # the same
    prediction_type: str | None = None  # the same
    timesteps: tuple[float, ...] = ()  # for as many steps, where they are not those of the spacing
    size: tuple[int, int] | None = None  # height and width where nobody says, if not the family's


V2 = ", or `version: v2` to sample it as you like"
UP_TO_16 = tuple(range(1, 17))  # more only cost time
ANIMATE_LCM = Distillation(  # arXiv 2402.00769; made for 4 to 8 steps
    "AnimateLCM", "lcm", "lcm", steps=6, possible_steps=UP_TO_16, guidance_scale=2.0, otherwise=V2
)

ANIMATE_LCM_I2V = Distillation(  # of its authors' demo
    "AnimateLCM-I2V",
    "lcm",
    "lcm",
    steps=6,
    possible_steps=UP_TO_16,
    guidance_scale=1.0,
    otherwise="",
    beta_end=0.014,
    lcm_timesteps=200,
)

LCM = Distillation(  # arXiv 2310.04378, as a LoRA 2311.05556
    "a latent consistency model", "lcm", "lcm", steps=4, possible_steps=UP_TO_16, guidance_scale=1.0, lcm_timesteps=50
)


def distilled_schedule(schedule: ScheduleConfig, distillation: Distillation | None) -> ScheduleConfig:
    """The schedule that a distilled motion module was trained with."""
    own = ("beta_end", "lcm_timesteps", "prediction_type")
    values = {name: getattr(distillation, name) for name in own} if distillation else {}
    return replace(schedule, **{name: value for name, value in values.items() if value is not None})


SDXL_TURBO = Distillation(  # arXiv 2311.17042
    "SDXL-Turbo",
    "euler_ancestral",
    "trailing",
    steps=4,
    possible_steps=(1, 2, 3, 4),
    guidance_scale=1.0,
    size=(512, 512),
)


def lightning(steps: int, family: str = "AnimateDiff") -> Distillation:
    """AnimateDiff-Lightning (arXiv 2403.12706), SDXL-Lightning (2402.13929): each file is for one number of steps."""
    return Distillation(
        f"{family}-Lightning of {steps} steps",
        "euler",
        "trailing",
        steps,
        possible_steps=(2, 3) if steps == 2 else (steps,),  # 3 on the file of 2 are its authors' own advice
        guidance_scale=1.0,
        otherwise=V2 if family == "AnimateDiff" else Distillation.otherwise,
    )


def consistency(timesteps: int, phases: int) -> Distillation:
    """A LoRA of the training stage `consistency`, distilled on so many timesteps in so many phases."""
    name = "a LoRA of the stage consistency"
    if phases == 1:
        return replace(LCM, name=name, lcm_timesteps=timesteps)
    return Distillation(name, "ddim", "trailing", phases, tuple(range(1, max(16, phases) + 1)), guidance_scale=1.0)


def hyper_sd(steps: int, *, guided: bool) -> Distillation:
    """Hyper-SD (arXiv 2404.13686): each file is for one number of steps, that of one step for more of them, too.

    Its authors sample several steps of the latter by TCD with eta 1, which is LCM's sampler but for its boundary
    condition, and one from timestep 800.

    Args:
        guided: whether it was distilled to be guided, as the files with CFG in their names.
    """
    scales = {"guidance_scale": 5.0, "max_guidance_scale": 8.0} if guided else {"guidance_scale": 1.0}
    name = f"Hyper-SD of {steps} step{'s' * (steps > 1)}"
    if steps == 1:
        several = tuple(range(1, 9))
        return Distillation(name, "lcm", "lcm", 1, several, **scales, lcm_timesteps=50, timesteps=(800.0,))
    return Distillation(name, "ddim", "trailing", steps, (steps,), **scales)


@dataclass(frozen=True)
class Recipe:
    """How the authors of a family of models sample it: what holds where nobody says.

    Attributes:
        schedule: the betas that the networks were trained with.
        steps: None leaves it to the caller.
        size: height and width in pixels.
        sizes: what SDXL is told where nobody says: original size, crop and target size; empty: those of the clip.
        width_first: whether width and left come before height and top there.
    """

    schedule: ScheduleConfig = ScheduleConfig()
    sampler: str = "ddim"
    steps: int | None = None
    guidance_scale: float = 7.5
    size: tuple[int, int] = (512, 512)
    sizes: tuple[tuple[int, int], ...] = ()
    width_first: bool = False


_SDXL = ScheduleConfig(beta_schedule="scaled_linear")
SD1_RECIPE = Recipe()
# A motion module's version, or the family of an image model -> how it is sampled, where it is not as SD 1.x is.
RECIPES: dict[str, Recipe] = {
    "sdxl": Recipe(_SDXL, "euler", 50, 5.0, size=(1024, 1024)),
    "sdxl-beta": Recipe(replace(_SDXL, beta_end=0.020), "euler", 100, 8.5, size=(1024, 1024)),
    "hotshot-xl": Recipe(
        _SDXL,
        "euler_ancestral",
        30,
        5.0,
        size=(384, 672),
        sizes=((1920, 1080), (0, 0), (512, 512)),
        width_first=True,
    ),
}


def recipe_of(version: str | None, *, sdxl: bool) -> Recipe:
    """How a model is sampled: as its motion module's authors do, or without one as its family's."""
    return RECIPES.get(version or "") or (RECIPES["sdxl"] if sdxl else SD1_RECIPE)


def usual_size(recipe: Recipe, distillation: Distillation | None) -> tuple[int, int]:
    """Height and width in pixels, where nobody says."""
    return (distillation and distillation.size) or recipe.size


@dataclass(frozen=True)
class SmallCLIPConfig:
    """The text and image encoder of Shapes, the toy data set."""

    size: int = 64  # pixels of a picture, both sides
    patch: int = 4  # pixels of the cells that the first convolution reads, both sides
    channels: tuple[int, ...] = (32, 64, 96)  # per level, highest resolution first
    width: int = 64  # of the embeddings and of the text transformer
    text_layers: int = 2
    text_heads: int = 2
    max_length: int = 32  # tokens of a text, start and end included
