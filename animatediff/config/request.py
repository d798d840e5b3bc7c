"""What to animate: one checked, frozen object, the same from a YAML, `key=value`, a call, or a clip's own settings.

Options stand in groups, one for each feature. An option says its default, its range, its help and its other spellings
(official YAML, diffusers, mmagic) here and nowhere else; `--help`, the docs and every message are made from that.
What several options say together is checked in `refusals.py`; what needs the files, in `pipeline/resolve.py`.
"""

from __future__ import annotations

from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, Literal

from animatediff.config.condition_options import I2V, PIA, Camera, ControlNets, IPAdapters, Mixture
from animatediff.config.finish_options import MAX_SIDE, Finish
from animatediff.config.memory_options import Memory
from animatediff.config.settings import Bool, Files, Float, Int, Many, TakesText, before, limits, opt, options
from animatediff.config.values import (
    ADAPTER,
    EMBEDDING,
    IMAGE_MODEL,
    LORA_FILE,
    MOTION_LORA,
    MOTION_MODULE,
    OTHER,
    PERSONALISED,
    PICTURES,
    SPARSECTRL,
    VAE_FILE,
    Images,
    Media,
    PathText,
    Prompt,
    Seed,
    Text,
    Varying,
    varying,
)

SD15_FOLDER = "models/StableDiffusion/stable-diffusion-v1-5"  # where the official script looks for the base model
MAX_FRAMES = 100_000  # that no machine can sample: a slip of the finger
Side = Annotated[Int, limits(ge=8, le=MAX_SIDE, multiple_of=8)]
Pair = tuple[Annotated[Int, limits(ge=0, le=MAX_SIDE)], Annotated[Int, limits(ge=0, le=MAX_SIDE)]]


# ---- groups ---------------------------------------------------------------------------------------------------


@options
class LoRAFile:
    """A LoRA and its scale; without one, the `lora_scale` of the model."""

    path: PathText
    scale: Float | None = opt(None, "factor of its update; by default lora_scale", "alpha")


@options
class MotionLoRA:
    """A MotionLoRA and the factor of its update."""

    path: PathText
    scale: Float = opt(1.0, "factor of its update", "alpha")


@options
class Embedding:
    """A textual inversion, and the word that stands for it in prompts: by default its file's stem."""

    path: PathText
    name: str = ""


def _with_path(value: Any) -> Any:
    """A path alone stands for the mapping that begins with it."""
    return {"path": value} if isinstance(value, (str, Path)) else value


@options
class Model:
    """The networks, by their files; "" means none, which all but `base` may be."""

    base: Annotated[PathText, IMAGE_MODEL] = opt(
        SD15_FOLDER,
        "image model, SD 1.x or SDXL: a diffusers folder or a single file",
        "pretrained_model_path",
        "base_model_path",
    )
    personalised: Annotated[PathText, PERSONALISED] = opt(
        "",
        "personalised model: its UNet, text encoder and, where present, VAE replace the base's",
        "dreambooth_path",
        "ckpt_path",
    )
    vae: Annotated[PathText, VAE_FILE] = opt(
        "", "VAE in place of theirs: its own file or an image model", "vae_path", "vae"
    )
    motion_module: Annotated[PathText, MOTION_MODULE] = opt(
        "", "motion module; none: every frame on its own", "motion_module", "motion_module_path"
    )
    version: Literal["", "v1", "v2", "v3", "animatelcm", "sdxl-beta", "hotshot-xl"] = opt(
        "", "version of the motion module, where its file cannot tell"
    )
    max_frames: Int = opt(0, "allow clips of this many frames, longer than the module was trained on", ge=0)
    norm_over_frames: Bool = opt(False, "pool the motion modules' GroupNorm over frames, as diffusers does")
    loras: Annotated[Files[Annotated[LoRAFile, before(_with_path)]], LORA_FILE, TakesText] = opt(
        (), "LoRAs of the image model: files, or {path: …, scale: …}", "lora_model_path", "lora_path"
    )
    lora_scale: Float = opt(0.8, "scale of LoRAs that have none of their own", "lora_alpha")
    lora_alpha_rule: Literal["standard", "official"] = opt(
        "standard", "official: the file's own alpha / rank is ignored, as the official code does"
    )
    motion_loras: Annotated[Files[Annotated[MotionLoRA, before(_with_path)]], MOTION_LORA, TakesText] = opt(
        (), "MotionLoRAs: files, or {path: …, scale: …}", "motion_module_lora_configs"
    )
    adapter: Annotated[PathText, ADAPTER] = opt("", "domain adapter", "adapter_lora_path")
    adapter_scale: Float = opt(1.0, "scale of the domain adapter", "adapter_lora_scale", "domain_lora_scale")
    embeddings: Annotated[Files[Annotated[Embedding, before(_with_path)]], EMBEDDING, TakesText] = opt(
        (), "textual inversions: files, or {path: …, name: …}"
    )
    inference_config: Annotated[PathText, OTHER] = opt("", "official inference YAML: schedule and motion module")


@options
class Prompts:
    """What to show, in words."""

    prompt: Many[Prompt] = opt((), "texts, or keyframes {frame: text} to travel between", "prompt", "prompt_map")
    negative_prompt: Many[Prompt] = opt(
        (), "what to avoid: one for all, or one for each; none: empty text, SDXL zeros", "n_prompt", "negative_prompt"
    )
    head_prompt: Text = opt("", "before every text, with a comma")
    tail_prompt: Text = opt("", "after every text, with a comma")
    weighting: Bool = opt(
        False, "read (word:1.2), [word], BREAK and <lora:name:0.8>; else they are text", "prompt_weighting"
    )
    clip_skip: Int = opt(1, "layer of the text encoder, from the end: 1 the last; SDXL takes 2 or more", ge=1)


@options
class Travel:
    """How a prompt gets from one keyframe's text to the next one's."""

    interpolation: Literal["lerp", "slerp"] = opt(
        "lerp", "lerp mixes two embeddings in proportion, slerp turns one into the other", "prompt_interpolation"
    )
    loop: Bool | None = opt(
        None, "whether the last keyframe goes on to the first; by default where the windows loop", "prompt_loop"
    )
    fixed_ratio: Float = opt(
        0.0, "part of each interval, from its beginning, in which the text stays", "prompt_fixed_ratio", ge=0, lt=1
    )


@options
class Size:
    """Of every clip."""

    num_frames: Int = opt(16, "frames", "L", "num_frames", "video_length", ge=1, le=MAX_FRAMES)
    height: Side | None = opt(None, "pixels (512; SDXL 1024, Turbo 512, Hotshot-XL 384)", "H", "height")
    width: Side | None = opt(None, "pixels (512; SDXL 1024, Turbo 512, Hotshot-XL 672)", "W", "width")


@options
class MicroConditioning:
    """What SDXL is told of the picture's sizes (arXiv 2307.01952, sec. 2.2), each as [height, width] in pixels."""

    original_size: Pair | None = opt(None, "of the picture it is to look like (the clip's; Hotshot-XL 1080 x 1920)")
    crop: Pair | None = opt(
        None, "top and left of its crop (0, 0: what is shown is centred)", "crop", "crops_coords_top_left"
    )
    target_size: Pair | None = opt(None, "that it is brought to (the clip's; Hotshot-XL 512 x 512)")
    aesthetic_score: Float = opt(6.0, "of the refiner: how good the picture is to look")
    negative_aesthetic_score: Float = opt(2.5, "of the refiner, for the negative prompt")


@options
class Sampling:
    """What is not set is what a distilled model needs, else what its family does (SDXL, SDXL-beta and Hotshot-XL have
    their own), else the default in brackets."""

    steps: Annotated[Int, limits(ge=1)] | None = opt(None, "sampling steps (25)", "steps", "num_inference_steps")
    guidance_scale: Annotated[Float, limits(ge=0)] | None = opt(
        None, "classifier-free guidance (7.5); 1 and below: no unconditional pass", "guidance_scale", "cfg_scale"
    )
    sampler: Literal["", "ddim", "euler", "euler_ancestral", "dpmpp_2m", "pndm", "lcm"] = opt(
        "", "sampler (ddim)", "sampler", "scheduler"
    )
    timestep_spacing: Literal["", "leading", "trailing", "linspace", "karras", "lcm"] = opt(
        "", "which timesteps are visited (leading, or as the inference config says)"
    )
    timesteps: Many[Float] = opt((), "these timesteps, falling, in place of spacing and steps; may be fractional")
    eta: Float = opt(0.0, "of ddim: 0 (deterministic) to 1 (the variance of DDPM)", ge=0, le=1)
    seed: Many[Seed] = opt((-1,), "of the noise: one for all prompts, or one for each; -1 draws one and records it")
    random_seed: Many[Seed] = opt((), "seeds that an earlier run drew; they take the place of -1")


@options
class Windows:
    """Overlapping windows of frames, for clips longer than the motion module was trained on."""

    schedule: Literal["open", "closed", "static", "uniform"] = opt(
        "open", "open: a beginning and an end; closed: a loop; static: equal at every step", "window_schedule"
    )
    length: Int = opt(0, "frames of a window (16, or the module's, if less)", "window_length", "context_length", ge=0)
    overlap: Annotated[Int, limits(ge=0)] | None = opt(
        None, "frames that neighbours share (a quarter of length)", "window_overlap", "context_overlap"
    )
    fuse: Literal["flat", "pyramid", "overlap-linear", "gaussian"] = opt(
        "pyramid", "how the frames of overlapping windows are weighted", "window_fuse"
    )
    stride: Int = opt(
        1, "of uniform: levels of windows of every 1st, 2nd, 4th … frame", "window_stride", "context_stride", ge=1
    )

    @property
    def loops(self) -> bool:
        """Whether the last frame is followed by the first."""
        return self.schedule in ("closed", "uniform")


@options
class Inputs:
    """Pictures and video to start from: img2vid, vid2vid, inpainting, extension."""

    video: Annotated[Media, PICTURES] = opt(None, "clip to start from (vid2vid): a file or a folder of pictures")
    image: Annotated[Media, PICTURES] = opt(None, "first frame (img2vid)")
    last_image: Annotated[Media, PICTURES] = opt(None, "last frame")
    mask: Annotated[Media, PICTURES] = opt(None, "where the video is painted anew, white (inpainting)")
    strength: Annotated[Float, limits(ge=0, le=1)] | None = opt(
        None, "0 (the video comes back) to 1 (nothing is kept); 0.8, with an image 0.9, with mask or extend 1"
    )
    inversion: Bool = opt(False, "start from the noise that DDIM inversion finds in the video")
    inversion_prompt: Text = opt("", "what the video shows, for the inversion")
    extend: Int = opt(0, "go on from the video's end to num_frames; frames known in each window of the chain", ge=0)
    image_ramp: Float = opt(32.0, "frames after which nothing of an image is left at the start", gt=0)
    video_start: Int = opt(0, "first frame of the video that is used", ge=0)
    video_stride: Int = opt(1, "every n-th frame of the video is used", ge=1)
    video_fps: Annotated[Float, limits(gt=0, le=1000)] | None = opt(
        None, "frames per second that the video is read at, whatever its own are"
    )


@options
class SparseCtrl:
    """Pictures of some frames, told to the network by a SparseCtrl encoder (arXiv 2311.16933)."""

    path: Annotated[PathText, SPARSECTRL] = opt("", "SparseCtrl encoder", "controlnet_path")
    config: Annotated[PathText, OTHER] = opt("", "its official YAML (not needed)", "controlnet_config")
    images: Annotated[Images, PICTURES] = opt((), "pictures of some frames", "controlnet_images", "conditioning_frames")
    frames: Many[Int] = opt(
        (0,), "the frame of each picture; -1 is the last", "controlnet_image_indexs", "controlnet_frame_indices"
    )
    scale: Many[Annotated[Float, limits(ge=0)]] = opt(
        (1.0,), "how much they count: one for all frames, or one for each", "controlnet_scale",
        "controlnet_conditioning_scale",
    )  # fmt: skip
    normalize: Bool = opt(False, "grey, from black to white: scribbles on other grounds", "normalize_condition_images")


@options
class Motion:
    """How much the motion modules do."""

    scale: Varying = opt(None, "factor of their effect, by frame or step; 0: none", "motion_scale")
    mask: Annotated[PathText, PICTURES] = opt("", "picture: where it is black, they do nothing", "motion_mask")
    stretch: Float = opt(
        1.0, "2: positions half as far apart, for clips twice as long or half as fast", "pe_stretch", gt=0, le=1000
    )


@options
class Guidance:
    """Beside the guidance scale."""

    schedule: varying(0) = opt(
        None,
        "factor of guidance_scale, by frame or step; no unconditional pass where that gives 1",
        "guidance_schedule",
    )
    rescale: Float = opt(0.0, "share of the rescaling of arXiv 2305.08891; 0.7 there", "guidance_rescale", ge=0, le=1)


@options
class PAG:
    """Perturbed-attention guidance (arXiv 2403.17377)."""

    scale: Float = opt(0.0, "0 is off; 3 in the paper", "pag_scale", ge=0)
    layers: Many[str] = opt(
        ("mid_block",), "beginnings of the names of blocks whose attention is perturbed", "pag_layers"
    )


@options
class FreeU:
    """Stronger backbone, weaker skip connections (arXiv 2309.11497); the defaults are the paper's for SD 1.4."""

    b1: Float = opt(1.5, "backbone factor of the coarsest block")
    b2: Float = opt(1.6, "backbone factor of the next block")
    s1: Float = opt(0.9, "skip factor of the coarsest block")
    s2: Float = opt(0.2, "skip factor of the next block")


@options
class FreeInit:
    """Sample several times, each from a start that the one before has improved (arXiv 2312.07537)."""

    iterations: Int = opt(3, "samplings", ge=1, le=100)
    filter: Literal["butterworth", "gaussian", "ideal", "box"] = opt("butterworth", "low-pass filter")
    order: Int = opt(4, "of butterworth: the higher, the sharper", ge=1, le=1000)
    spatial_stop: Float = opt(0.25, "part of the highest spatial frequency that is kept", ge=0, le=1)
    temporal_stop: Float = opt(0.25, "part of the highest temporal frequency that is kept", ge=0, le=1)
    fast: Bool = opt(False, "the first iterations take fewer steps")

    def steps(self, iteration: int, steps: int) -> int:
        """Sampling steps of an iteration (from 0)."""
        return max(steps * (iteration + 1) // self.iterations, 1) if self.fast else steps


@options
class LoRASchedules:
    """Scales of LoRAs that change while a clip is sampled."""

    schedule: varying(over_steps=True) = opt(None, "factor of the LoRAs' scales, by step", "lora_schedule")
    motion_schedule: varying(over_steps=True) = opt(
        None, "factor of all MotionLoRAs' scales, by step", "motion_lora_schedule"
    )


@options
class Noise:
    """The start noise."""

    type: Literal["random", "shuffle", "repeat", "constant"] = opt(
        "random", "shuffle: FreeNoise (arXiv 2310.15169); repeat, constant: the same frames again", "noise_type"
    )


@options
class Loop:
    """Clips that loop without windows."""

    mode: Literal["", "rotate", "pingpong"] = opt(
        "", "rotate: every step begins with another frame; pingpong: there and back"
    )


@options
class Output:
    """The file of a clip."""

    name: str = opt("", "how messages and files call this entry")
    fps: Float = opt(8.0, "frames per second", gt=0)
    format: Literal["gif", "mp4", "webp", "png"] = opt("gif", "png: a folder of lossless frames")
    loop_count: Int = opt(0, "how often a GIF or WebP plays; 0: for ever", ge=0, le=65535)


@options
class Request:
    """Everything that can be asked for. `spelled` remembers how options were called, for messages."""

    model: Model = Model()
    prompts: Prompts = Prompts()
    travel: Travel = Travel()
    size: Size = Size()
    micro_conditioning: MicroConditioning = MicroConditioning()
    sampling: Sampling = Sampling()
    windows: Windows | None = None
    inputs: Inputs = Inputs()
    sparsectrl: SparseCtrl = SparseCtrl()
    controlnets: ControlNets = ControlNets()
    ip_adapters: IPAdapters = IPAdapters()
    pia: PIA = PIA()
    i2v: I2V = I2V()
    camera: Camera = Camera()
    mixture: Mixture = Mixture()
    motion: Motion = Motion()
    guidance: Guidance = Guidance()
    pag: PAG = PAG()
    freeu: FreeU | None = None
    freeinit: FreeInit | None = None
    loras: LoRASchedules = LoRASchedules()
    noise: Noise = Noise()
    loop: Loop = Loop()
    finish: Finish = Finish()
    memory: Memory = Memory()
    output: Output = Output()
    spelled: dict[str, str] = field(default_factory=dict, compare=False, repr=False)

    @property
    def loops(self) -> bool:
        """Whether the last frame is followed by the first."""
        return self.loop.mode == "rotate" or (self.windows is not None and self.windows.loops)

    @property
    def written_fps(self) -> float:
        """Frames per second of the clip's file."""
        return self.output.fps * self.finish.interpolate

    def per_prompt(self) -> list[tuple[str | dict[int, str], str | dict[int, str], int]]:
        """(prompt, negative prompt, seed) of every prompt; recorded seeds take the place of -1."""
        p, s, n = self.prompts, self.sampling, len(self.prompts.prompt)

        def each(values: tuple[Any, ...]) -> tuple[Any, ...]:
            return values * n if len(values) == 1 else values

        seeds = each(s.seed)
        seeds = [b if a == -1 else a for a, b in zip(seeds, s.random_seed or seeds, strict=True)]
        framed = [self._framed(prompt) for prompt in p.prompt]
        return list(zip(framed, each(p.negative_prompt or ("",)), seeds, strict=True))

    def _framed(self, prompt: str | dict[int, str]) -> str | dict[int, str]:
        if isinstance(prompt, dict):
            return {frame: str(self._framed(text)) for frame, text in prompt.items()}
        return ", ".join(t for t in (self.prompts.head_prompt, prompt, self.prompts.tail_prompt) if t.strip())
