"""IP-Adapter (arXiv 2308.06721): pictures beside the prompt, which may travel from one to the next like prompts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from animatediff.checkpoints.image_encoder_files import ImageEncoder, load_image_encoder
from animatediff.checkpoints.ip_adapter_files import load_ip_adapter
from animatediff.checkpoints.load import ImageModel
from animatediff.config.condition_options import IPAdapter as Options
from animatediff.config.keyframes import Keyframes
from animatediff.config.request import Request, Travel
from animatediff.diffusion.schedule import step_of
from animatediff.features.controlnet import active
from animatediff.features.feature import FrameDenoise, Run
from animatediff.features.guide_pictures import read_pictures
from animatediff.features.prompt_travel import travel_context
from animatediff.media.pictures import fit
from animatediff.models.ip_adapter_network import ImagePrompt, IPAdapter, image_prompted, layer_weights
from animatediff.models.unet import UNet
from animatediff.utils import UserError, naming


@contextmanager
def ip_adapter(denoise: FrameDenoise, run: Run) -> Iterator[FrameDenoise]:
    """`ip_adapter`: one or several, whose effects add up."""
    adapters = run.request.ip_adapters.adapters
    if not adapters:
        yield denoise
        return
    known = run.once("ip_adapters", lambda: [read_tokens(run, i) for i in range(len(adapters))])
    prompts = [(prompt, tokens.options) for tokens in known for prompt in tokens.prompts(run)]
    levels = len(run.model.unet.config.block_out_channels)

    def prompted(x: Tensor, t: Tensor, frames: Tensor, **inputs: Any) -> Tensor:
        step, progress = step_of(run.timesteps, t), run.progress(t)
        for prompt, options in prompts:
            scale, acts = Keyframes.read(options.scale), active(options.start, options.end, step, len(run.timesteps))
            scales = torch.tensor([acts * scale.at(frame, progress) for frame in frames.tolist()])
            prompt.select(frames, scales, (x.shape[-2], x.shape[-1]), levels)
        return denoise(x, t, frames, **inputs)

    with image_prompted(run.model.unet, [prompt for prompt, _ in prompts]):
        yield prompted


class IPAdapters(nn.Module):
    """The adapters of a request and the image encoder that they share."""

    def __init__(self, adapters: list[IPAdapter], encoder: ImageEncoder):
        super().__init__()
        self.adapters = nn.ModuleList(adapters)
        self.encoder = encoder

    def __len__(self) -> int:
        return len(self.adapters)


def load(request: Request, headers: Any, image: ImageModel, unet: UNet) -> tuple[IPAdapters, str] | None:
    """All IP-Adapters of a request with their image encoder, and a line about them; None where there is none.

    Raises:
        UserError: an adapter does not fit the image model, or the encoder is not the one it was trained with.
    """
    if not request.ip_adapters.adapters:
        return None
    encoder_path = headers.paths["ip_adapters.image_encoder"]
    encoder, adapters, lines = load_image_encoder(encoder_path), [], []
    for i, options in enumerate(request.ip_adapters.adapters):
        with naming(f"ip_adapter[{i}]"):
            layer_weights(unet, options.layers)
        adapter, report = load_ip_adapter(headers.paths[f"ip_adapters.adapters[{i}].path"], image.unet)
        base, expected = adapter.config.variant == "base", adapter.config.encoder_width
        got = encoder.embedding_width if base else encoder.width
        if got != expected:
            what = "embeddings" if base else "hidden states"
            raise UserError(
                f"image_encoder: got {encoder_path} with {what} of width {got}, expected {expected} for {report.path}: "
                "choose the encoder the adapter was trained with (H/14 for nearly all of SD 1.5, bigG/14 for vit-G)"
            )
        adapters.append(adapter)
        lines.append(str(report))
    return IPAdapters(adapters, encoder), "\n".join(lines)


@dataclass(frozen=True)
class Tokens:
    """What an adapter makes of its pictures.

    Attributes:
        image: for each prompt of its own (f or 1, l, d); several where pictures have masks of their own.
        nothing: (1, l, d) of no picture, as many tokens.
        masks: one (H, W) for each prompt, or None.
    """

    adapter: IPAdapter
    options: Options
    image: list[Tensor]
    nothing: list[Tensor]
    masks: list[Tensor | None]

    def prompts(self, run: Run) -> list[ImagePrompt]:
        """For the parts of the batch of a run."""
        weights = layer_weights(run.model.unet, self.options.layers)
        found = []
        for image, nothing, mask in zip(self.image, self.nothing, self.masks, strict=True):
            parts = [nothing.expand_as(image) if part == "unconditional" else image for part in run.parts]
            found.append(ImagePrompt(self.adapter, torch.stack(parts), layers=weights, mask=mask))
        return found


def read_tokens(run: Run, i: int) -> Tokens:
    """Encode and project the pictures of an adapter. Raises: UserError where they cannot be read."""
    options, networks, model = run.request.ip_adapters.adapters[i], run.model.networks["ip_adapters"], run.model
    adapter, encoder = networks.adapters[i], networks.encoder
    with naming(f"ip_adapter[{i}]"):
        pictures = read_pictures(options.images)
        masks = [_mask(mask, run.request) for mask in read_pictures(options.masks).values()]
    pixels = torch.cat([encoder.pixels(p, fit=options.fit) for p in pictures.values()]).to(model.device)
    nothing = torch.zeros_like(pixels[:1])
    if adapter.config.variant == "base":
        known, none = encoder.embeddings(pixels), torch.zeros(1, encoder.embedding_width, device=pixels.device)
    else:
        known, none = encoder.hidden(pixels), encoder.hidden(nothing)
    with torch.no_grad():
        tokens, empty = adapter(known.to(model.dtype)), adapter(none.to(model.dtype))
    if isinstance(options.images, dict):
        travel = travel_context(Travel(), tokens, list(pictures), run.request.size.num_frames)
        image = [travel.at(torch.arange(run.request.size.num_frames))[0]]
        return Tokens(adapter, options, image, [empty], masks or [None])
    if len(masks) > 1:
        return Tokens(adapter, options, [t[None] for t in tokens], [empty] * len(masks), masks)
    row = tokens.flatten(0, 1)[None]
    return Tokens(adapter, options, [row], [empty.repeat(1, len(tokens), 1)], masks or [None])


def _mask(picture: Image.Image, request: Request) -> Tensor:
    fitted = fit(picture.convert("L"), request.size.height, request.size.width)
    return torch.frombuffer(bytearray(fitted.tobytes()), dtype=torch.uint8).view(fitted.height, fitted.width) / 255
