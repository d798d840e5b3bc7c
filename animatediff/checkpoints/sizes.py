"""Network sizes from a state dict's shapes; what shapes cannot tell comes from metadata, a mapping of strings.

Metadata names of an image model: `num_heads` or `head_dim`, `norm_num_groups`, `prediction_type`,
`vae_norm_num_groups`, `vae_scaling_factor`, `text_num_heads`, `text_activation`, and with `text_2` in place of `text`
the same of SDXL's second text encoder. Of a motion module: `version`, `num_heads`, `max_frames`, `norm_over_frames`,
`positional_encoding`, `norm_num_groups`. Of a SparseCtrl encoder: `num_heads`, `norm_num_groups`, `motion_num_heads`,
`max_frames`, `norm_over_frames`, `positional_encoding`. Defaults are Stable Diffusion 1.5's, of SDXL SDXL_METADATA. All
keys are in our names (see keymaps.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace

from animatediff.checkpoints.files import StateDict
from animatediff.checkpoints.keymaps import MOTION_MARK, POSITIONAL_ENDINGS
from animatediff.checkpoints.metadata import Metadata, choice, integer, number
from animatediff.config.networks import (
    MOTION_VERSIONS,
    MotionConfig,
    SparseCtrlConfig,
    TextConfig,
    UNetConfig,
    VAEConfig,
)
from animatediff.utils import UserError, describe

TEXT_ACTIVATIONS = ("quick_gelu", "gelu")  # OpenAI's CLIP, OpenCLIP
HEAD_WIDTH_OF_CLIP = 64
# What no shape of an SDXL file tells, where its metadata do not either.
SDXL_METADATA = {"head_dim": "64", "vae_scaling_factor": "0.13025", "text_2_activation": "gelu"}
# Metadata of a SparseCtrl file about its motion modules -> what a motion module's own file calls it.
SPARSECTRL_MOTION = {
    "motion_num_heads": "num_heads",
    "max_frames": "max_frames",
    "norm_over_frames": "norm_over_frames",
    "positional_encoding": "positional_encoding",
}


def unet_config(tensors: StateDict, metadata: Metadata) -> UNetConfig:
    """Sizes of an image UNet.

    Raises:
        UserError: the heads or norm groups do not divide a width; say which in the metadata.
    """
    return replace(encoder_config(tensors, metadata), out_channels=_shape(tensors, "conv_out.weight", 4)[0])


def encoder_config(tensors: StateDict, metadata: Metadata) -> UNetConfig:
    """As `unet_config`, of weights that need not hold more than the way down and the middle block."""
    widths = _widths(tensors, "down_blocks.{}.resnets.0.conv1.weight")
    attention = tuple(f"down_blocks.{i}.attentions.0.norm.weight" in tensors for i in range(len(widths)))
    added = "add_embedding.linear_1"
    mid, blocks = "mid_block.attentions.0.", "attentions.0.transformer_blocks."
    depths = [_count(tensors, f"down_blocks.{i}.{blocks}") for i in range(len(widths))]
    middle = _count(tensors, f"mid_block.{blocks}")
    same = {middle, *depths} <= {middle, 0}
    config = UNetConfig(
        in_channels=_shape(tensors, "conv_in.weight", 4)[1],
        block_out_channels=widths,
        attention_levels=attention,
        layers_per_block=_count(tensors, "down_blocks.0.resnets."),
        context_dim=_shape(tensors, f"{mid}transformer_blocks.0.attn2.to_k.weight", 2)[1],
        num_heads=integer(metadata, "num_heads", 8),
        num_transformer_blocks=middle if same else (*depths[:-1], middle),
        norm_num_groups=integer(metadata, "norm_num_groups", 32),
        linear_projection=len(_shape(tensors, f"{mid}proj_in.weight")) == 2,
        head_dim=0 if "num_heads" in metadata else integer(metadata, "head_dim", 0, least=0),
        added_channels=_shape(tensors, f"{added}.weight", 2)[1] if f"{added}.weight" in tensors else 0,
    )
    with_attention = [w for w, a in zip(widths, (*attention[:-1], True), strict=True) if a]  # the middle always has
    name = "head_dim" if config.head_dim else "num_heads"
    _check_divides(name, getattr(config, name), with_attention)
    _check_divides("norm_num_groups", config.norm_num_groups, widths)
    return config


def vae_config(tensors: StateDict, metadata: Metadata) -> VAEConfig:
    """Sizes of an autoencoder."""
    config = VAEConfig(
        in_channels=_shape(tensors, "encoder.conv_in.weight", 4)[1],
        latent_channels=_shape(tensors, "decoder.conv_in.weight", 4)[1],
        block_out_channels=_widths(tensors, "encoder.down_blocks.{}.resnets.0.conv1.weight"),
        layers_per_block=_count(tensors, "encoder.down_blocks.0.resnets."),
        norm_num_groups=integer(metadata, "vae_norm_num_groups", 32),
        scaling_factor=number(metadata, "vae_scaling_factor", 0.18215),
    )
    _check_divides("vae_norm_num_groups", config.norm_num_groups, config.block_out_channels)
    return config


def text_config(tensors: StateDict, metadata: Metadata, *, name: str = "text") -> TextConfig:
    """Sizes of a CLIP text encoder; `name` is "text_2" for SDXL's second."""
    vocab_size, width = _shape(tensors, "text_model.embeddings.token_embedding.weight", 2)
    config = TextConfig(
        vocab_size=vocab_size,
        width=width,
        layers=_count(tensors, "text_model.encoder.layers."),
        num_heads=integer(metadata, f"{name}_num_heads", max(1, width // HEAD_WIDTH_OF_CLIP)),
        mlp_width=_shape(tensors, "text_model.encoder.layers.0.mlp.fc1.weight", 2)[0],
        max_length=_shape(tensors, "text_model.embeddings.position_embedding.weight", 2)[0],
        activation=choice(metadata, f"{name}_activation", TEXT_ACTIVATIONS) or TEXT_ACTIVATIONS[0],
        projection_width=_shape(tensors, "text_projection.weight", 2)[0] if "text_projection.weight" in tensors else 0,
    )
    _check_divides(f"{name}_num_heads", config.num_heads, [width])
    return config


def image_metadata_of(
    unet: UNetConfig,
    vae: VAEConfig | None,
    text: TextConfig | None,
    text_2: TextConfig | None = None,
) -> dict[str, str]:
    """What a file of this image model has to carry beside its weights. Norm groups only where they are not 32."""
    metadata: dict[str, object] = {"head_dim": unet.head_dim} if unet.head_dim else {"num_heads": unet.num_heads}
    for name, encoder in (("text", text), ("text_2", text_2)):
        if encoder:
            metadata |= {f"{name}_num_heads": encoder.num_heads, f"{name}_activation": encoder.activation}
    if unet.norm_num_groups != 32:
        metadata["norm_num_groups"] = unet.norm_num_groups
    return {name: str(value) for name, value in metadata.items()} | (vae_metadata_of(vae) if vae else {})


def vae_metadata_of(config: VAEConfig) -> dict[str, str]:
    """What a file of this autoencoder has to carry beside its weights. Norm groups only where they are not 32."""
    groups = {"vae_norm_num_groups": str(config.norm_num_groups)} if config.norm_num_groups != 32 else {}
    return {"vae_scaling_factor": str(config.scaling_factor)} | groups


def motion_metadata_of(config: MotionConfig, *, norm_num_groups: int = 32) -> dict[str, str]:
    """What a file of this motion module has to carry beside its weights."""
    metadata = {"version": config.version, "num_heads": str(config.num_heads), "max_frames": str(config.max_frames)}
    if config.norm_over_frames:
        metadata["norm_over_frames"] = "true"
    if not config.positional_encoding:  # files without the table say nothing: it is computed
        metadata["positional_encoding"] = "false"
    return metadata | ({"norm_num_groups": str(norm_num_groups)} if norm_num_groups != 32 else {})


def sparsectrl_config(
    tensors: StateDict, metadata: Metadata, *, length: int | None = None, norm_over_frames: bool = False
) -> SparseCtrlConfig:
    """Sizes of a SparseCtrl encoder in official names; `length` is its positional encoding's, where it has one.

    Raises:
        UserError: as `unet_config` and `motion_config`.
    """
    embedding = "controlnet_cond_embedding."
    pixels = f"{embedding}conv_in.weight" in tensors
    unet = encoder_config(tensors, metadata)
    motion = motion_config(
        {key: t for key, t in tensors.items() if MOTION_MARK in key},
        {new: metadata[old] for old, new in SPARSECTRL_MOTION.items() if old in metadata},
        levels=len(unet.block_out_channels),
        length=length,
        norm_over_frames=norm_over_frames,
    )
    widths = [_shape(tensors, f"{embedding}conv_in.weight", 4)[0]] if pixels else []
    while (key := f"{embedding}blocks.{2 * len(widths) - 1}.weight") in tensors:
        widths.append(_shape(tensors, key, 4)[0])
    return SparseCtrlConfig(
        unet=unet.with_motion(motion),
        condition_channels=_shape(tensors, f"{embedding}{'conv_in.' * pixels}weight", 4)[1] - 1,
        pixel_channels=tuple(widths),
    )


def sparsectrl_metadata_of(config: SparseCtrlConfig) -> dict[str, str]:
    """What a file of this SparseCtrl encoder has to carry beside its weights."""
    unet, motion = config.unet, config.unet.motion
    assert motion is not None
    facts = motion_metadata_of(motion, norm_num_groups=unet.norm_num_groups)
    of_motion = {old: facts[new] for old, new in SPARSECTRL_MOTION.items() if new in facts}
    groups = {"norm_num_groups": facts["norm_num_groups"]} if "norm_num_groups" in facts else {}
    return {"num_heads": str(unet.num_heads)} | of_motion | groups


def motion_config(
    tensors: StateDict,
    metadata: Metadata,
    *,
    levels: int,
    length: int | None,
    version: str | None = None,
    norm_over_frames: bool = False,
) -> MotionConfig:
    """Sizes of a motion module in official names.

    Args:
        tensors: motion keys only.
        levels: resolutions of the UNet it goes into.
        length: frames of the file's positional encoding, where it has one.
        version: what the user says it is, a key of MOTION_VERSIONS.
        norm_over_frames: see MotionConfig; also on where the metadata says so.

    Raises:
        UserError: the version cannot be told, or the file contradicts `version`.
    """
    base = MOTION_VERSIONS[resolve_version(tensors, metadata, length=length, asked=version)]
    levels_down = _indices(tensors, "down_blocks.")
    levels_up = {levels - 1 - i for i in _indices(tensors, "up_blocks.")}
    block = re.compile(
        r".*motion_modules\.0\.temporal_transformer\.transformer_blocks\.(\d+)\.attention_blocks\.(\d+)\."
    )
    inside = [(int(m[1]), int(m[2])) for key in tensors if (m := block.match(key))]
    config = replace(
        base,
        max_frames=trained_frames(metadata, length=length, version=base.version),
        mid_block=has_mid_block(tensors),
        num_heads=integer(metadata, "num_heads", 8),
        num_transformer_blocks=1 + max((b for b, _ in inside), default=0),
        attentions_per_block=1 + max((a for _, a in inside), default=0),
        resolutions=tuple(2**i for i in sorted(levels_down | levels_up) if i >= 0),
        up_block_modules=bool(levels_up),
        norm_over_frames=base.norm_over_frames or norm_over_frames or metadata.get("norm_over_frames") == "true",
        temporal="convolution" if any(".conv." in key for key in tensors) else "attention",
        positional_encoding=choice(metadata, "positional_encoding", ("true", "false")) != "false",
    )
    if config.temporal == "attention":
        _check_divides("num_heads", config.num_heads, motion_widths(tensors).values())
    return config


def trained_frames(metadata: Metadata, *, length: int | None, version: str) -> int:
    """The longest clip a motion module saw: by its metadata, its positional encoding's length, or its version."""
    return integer(metadata, "max_frames", length or MOTION_VERSIONS[version].max_frames)


def has_mid_block(tensors: StateDict) -> bool:
    return any(key.startswith("mid_block.") for key in tensors)


def detect_version(tensors: StateDict, metadata: Metadata, *, length: int | None) -> tuple[str | None, str]:
    """The version of a motion module in official names and the evidence; None where the file does not tell.

    v2 alone has a module in the middle block (AnimateLCM too, but without positional encodings). v1 and v3 have the
    same keys and shapes, as have SDXL-beta and Hotshot-XL at three levels; only the length of their positional
    encodings differs.
    """
    if version := metadata.get("version"):
        if version not in MOTION_VERSIONS:
            known = ", ".join(MOTION_VERSIONS)
            raise UserError(f"got version {describe(version)} in the metadata, expected one of {known}")
        return version, "its metadata says so"
    if has_mid_block(tensors):
        return (
            ("animatelcm", "has a mid block, no positional encoding") if length is None else ("v2", "has a mid block")
        )
    if not any(key.startswith("up_blocks.") for key in tensors):
        return "sparsectrl", "has modules in the down blocks only"
    versions = {MOTION_VERSIONS[name].max_frames: name for name in candidate_versions(tensors)}
    if length in versions:
        return versions[length], f"has no mid block and a positional encoding of {length} frames"
    short, long = sorted(versions)
    if length is None:
        both = f"{versions[short]} and {versions[long]}"
        return None, f"it has no mid block, and without a positional encoding {both} look the same"
    return None, (
        f"its positional encoding has {length} frames, {versions[short]}'s has {short} and {versions[long]}'s {long}"
    )


def candidate_versions(tensors: StateDict) -> tuple[str, str]:
    """What a motion module without a mid block can be: three levels are SDXL's."""
    return ("hotshot-xl", "sdxl-beta") if motion_levels(tensors) == 3 else ("v1", "v3")


def resolve_version(tensors: StateDict, metadata: Metadata, *, length: int | None, asked: str | None = None) -> str:
    """The version to build: the file's, which must not contradict the one `asked` for.

    Raises:
        UserError: unknown, undecidable or contradictory.
    """
    if asked is not None and asked not in MOTION_VERSIONS:
        raise UserError(f"got version {describe(asked)}, expected one of {', '.join(MOTION_VERSIONS)}")
    found, evidence = detect_version(tensors, metadata, length=length)
    one, other = candidate_versions(tensors)
    if asked is None:
        if found is None:
            raise UserError(
                f"got a motion module whose version cannot be told ({evidence}): "
                f"set `version: {one}` or `version: {other}` in the config, or in the file's metadata"
            )
        return found
    possible = MOTION_VERSIONS[asked].mid_block if has_mid_block(tensors) else asked in (one, other)
    # v2 and AnimateLCM are one network; a file without positional encodings can be either.
    undecided = found is None or (found == "animatelcm" and "version" not in metadata)
    if asked == found or (undecided and possible):
        return asked
    expected = found or f"{one} or {other}"
    raise UserError(
        f"got a {expected} module ({evidence}) with a {asked} config: set `version: {expected}` or choose another file"
    )


def positional_length(tensors: StateDict) -> int | None:
    """Frames of the positional encoding that older files carry, (1, frames, channels)."""
    tables = [t for key, t in tensors.items() if key.endswith(POSITIONAL_ENDINGS) and t.dim() == 3]
    return tables[0].shape[1] if tables else None


def adapter_length(tensors: StateDict, length: int | None) -> int | None:
    """What the length in a diffusers adapter proves: it is a setting of the conversion, 32 unless told otherwise.

    So only 24 (v1's, Hotshot-XL's) tells the version where there is no mid block, and nothing marks an AnimateLCM where
    there is one.
    """
    if has_mid_block(tensors):
        return length or MOTION_VERSIONS["v2"].max_frames
    return length if length == MOTION_VERSIONS["v1"].max_frames else None


def motion_levels(tensors: StateDict) -> int:
    """Resolutions of a UNet that a motion module in official names fills."""
    return 1 + max(_indices(tensors, "down_blocks.") | _indices(tensors, "up_blocks."), default=-1)


def motion_widths(tensors: StateDict, *, side: str = "down") -> dict[int, int]:
    """Channels of a motion module in official names, by the number of the down (or up) block."""
    pattern = re.compile(rf"{side}_blocks\.(\d+)\.motion_modules\.0\.temporal_transformer\.norm\.weight")
    return {int(m[1]): _shape(tensors, key, 1)[0] for key in tensors if (m := pattern.fullmatch(key))}


def _shape(tensors: StateDict, key: str, dims: int = 0) -> tuple[int, ...]:
    """The shape of a weight, of `dims` dimensions where that is told."""
    if key not in tensors:
        raise UserError(f"got weights without {key}, expected a complete network: the file lacks parts, choose another")
    shape = tuple(tensors[key].shape)
    if dims and len(shape) != dims:
        raise UserError(
            f"got shape {shape} of {key}, expected {dims} dimensions: the file is damaged or another network's"
        )
    return shape


def _widths(tensors: StateDict, template: str) -> tuple[int, ...]:
    widths = []
    while (key := template.format(len(widths))) in tensors:
        widths.append(_shape(tensors, key, 4)[0])
    if not widths:
        raise UserError(f"got weights without {template.format(0)}, expected a complete network: choose another file")
    return tuple(widths)


def _indices(keys: Iterable[str], prefix: str) -> set[int]:
    """The numbers that follow `prefix` in motion or other keys."""
    number = re.compile(re.escape(prefix) + r"([0-9]{1,6})\.")
    found = set()
    for key in keys:
        if key.startswith(prefix):
            if not (match := number.match(key)):
                raise UserError(f"got {key}, expected a number after {prefix}: the file is damaged")
            found.add(int(match[1]))
    return found


def _count(tensors: StateDict, prefix: str) -> int:
    return len(_indices(tensors, prefix))


def _check_divides(name: str, divisor: int, widths: Iterable[int]) -> None:
    if wrong := sorted({w for w in widths if w % divisor}):
        raise UserError(
            f"got {name} {divisor}, expected a divisor of the widths {', '.join(map(str, wrong))}: "
            f"write the right `{name}` into the file's metadata (or config.json)"
        )
