"""The autoencoder between pixels and latents (AutoencoderKL, Rombach et al. 2022, arXiv 2112.10752)."""

from __future__ import annotations

import torch
from animatediff_kernels import attention
from animatediff_kernels.cpu import laid_out, with_fast_products
from einops import rearrange
from torch import Tensor, nn

from animatediff.config.networks import VAEConfig
from animatediff.models.layers import Downsample, GroupNorm, ResnetBlock, Upsample
from animatediff.models.tiles import tiled

EPS = 1e-6  # of every GroupNorm in the VAE


class VAEAttention(nn.Module):
    """Single-head self-attention over the latent pixels of one image, in the middle of encoder and decoder."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.group_norm = GroupNorm(groups, channels, eps=EPS)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        tokens = rearrange(self.group_norm(x), "n c h w -> n (h w) c")
        q, k, v = self.to_q(tokens), self.to_k(tokens), self.to_v(tokens)
        out = attention(q, k, v, num_heads=1, backend="torch")  # one head of 512: wider than any Triton kernel takes
        return x + rearrange(self.to_out[0](out), "n (h w) c -> n c h w", h=x.shape[-2])


class MidBlock(nn.Module):
    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.resnets = nn.ModuleList([ResnetBlock(channels, channels, groups=groups, eps=EPS) for _ in range(2)])
        self.attentions = nn.ModuleList([VAEAttention(channels, groups)])

    def forward(self, x: Tensor) -> Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Stage(nn.Module):
    """The ResNet blocks of one resolution and the resampler that leads to the next."""

    def __init__(self, in_channels: int, out_channels: int, layers: int, groups: int, resample: str | None):
        super().__init__()
        widths = [in_channels] + [out_channels] * layers
        self.resnets = nn.ModuleList(
            [ResnetBlock(a, b, groups=groups, eps=EPS) for a, b in zip(widths, widths[1:], strict=False)]
        )
        if resample == "down":
            self.downsamplers = nn.ModuleList([Downsample(out_channels, asymmetric=True)])
        elif resample == "up":
            self.upsamplers = nn.ModuleList([Upsample(out_channels)])
        self.resample = resample

    def forward(self, x: Tensor) -> Tensor:
        for resnet in self.resnets:
            x = resnet(x)
        if self.resample == "down":
            return self.downsamplers[0](x)
        return self.upsamplers[0](x) if self.resample == "up" else x


class Encoder(nn.Module):
    def __init__(self, config: VAEConfig):
        super().__init__()
        widths, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        last = len(widths) - 1
        self.down_blocks = nn.ModuleList(
            Stage(widths[max(i - 1, 0)], w, config.layers_per_block, groups, "down" if i < last else None)
            for i, w in enumerate(widths)
        )
        self.mid_block = MidBlock(widths[-1], groups)
        self.conv_norm_out = GroupNorm(groups, widths[-1], eps=EPS)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    @with_fast_products
    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(laid_out(x, self.conv_in.weight))
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(self.conv_norm_out(self.mid_block(x), silu=True)).contiguous()


class Decoder(nn.Module):
    def __init__(self, config: VAEConfig):
        super().__init__()
        widths, groups = tuple(reversed(config.block_out_channels)), config.norm_num_groups
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid_block = MidBlock(widths[0], groups)
        last = len(widths) - 1
        self.up_blocks = nn.ModuleList(
            Stage(widths[max(i - 1, 0)], w, config.layers_per_block + 1, groups, "up" if i < last else None)
            for i, w in enumerate(widths)
        )
        self.conv_norm_out = GroupNorm(groups, widths[-1], eps=EPS)
        self.conv_out = nn.Conv2d(widths[-1], config.in_channels, 3, padding=1)

    @with_fast_products
    def forward(self, z: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(laid_out(z, self.conv_in.weight)))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(self.conv_norm_out(x, silu=True)).contiguous()


class VAE(nn.Module):
    """Encoder and decoder, frame by frame.

    Attributes:
        tile: pixels of a side of the overlapping tiles that are encoded and decoded one after the other; 0: whole
            frames. Each tile is normalised by itself, so that what comes out is not quite the same.
        chunk_frames: frames that are worked on at once where a call does not say; 0: 16 encoded, 8 decoded.
    """

    tile = 0
    chunk_frames = 0

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(2 * config.latent_channels, 2 * config.latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(config.latent_channels, config.latent_channels, 1)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of the posterior, each (n, latent_channels, H/8, W/8), unscaled.

        x: (n, 3, H, W) in [-1, 1], H and W divisible by `config.downsampling`.
        """
        side = self.config.downsampling
        moments = tiled(lambda part: self.quant_conv(self.encoder(part)), x, self.tile, shrink=side)
        mean, logvar = moments.chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)

    def decode(self, z: Tensor) -> Tensor:
        """Pixels (n, 3, H, W), about [-1, 1] and not clamped, of unscaled latents (n, latent_channels, h, w)."""
        side = self.config.downsampling
        return tiled(lambda part: self.decoder(self.post_quant_conv(part)), z, self.tile // side, grow=side)

    def encode_video(
        self, video: Tensor, *, generator: torch.Generator | None = None, chunk_frames: int | None = None
    ) -> Tensor:
        """Scaled latents (b, f, c, h, w) of a video (b, f, 3, H, W) in [-1, 1], `chunk_frames` images at a time.

        With a `generator` the posterior is sampled (CPU noise, same on every device), else its mean is taken.
        """
        frames = rearrange(video, "b f c h w -> (b f) c h w")
        parts = []
        for chunk in frames.split(chunk_frames or self.chunk_frames or 16):
            mean, logvar = self._safely(self.encode, chunk)
            if generator is not None:
                noise = torch.randn(mean.shape, generator=generator).to(mean)
                mean = mean + (0.5 * logvar).exp() * noise
            parts.append(mean)
        return rearrange(torch.cat(parts), "(b f) c h w -> b f c h w", b=len(video)) * self.config.scaling_factor

    def decode_video(self, latents: Tensor, *, chunk_frames: int | None = None) -> Tensor:
        """Pixels (b, f, 3, H, W) in [-1, 1] of scaled latents (b, f, c, h, w), `chunk_frames` images at a time."""
        frames = rearrange(latents, "b f c h w -> (b f) c h w") / self.config.scaling_factor
        chunks = frames.split(chunk_frames or self.chunk_frames or 8)
        parts = [self._safely(self.decode, chunk).clamp(-1, 1) for chunk in chunks]
        return rearrange(torch.cat(parts), "(b f) c h w -> b f c h w", b=len(latents))

    def _safely(self, function, x: Tensor):
        """Call `function` in the weights' dtype; where half precision overflows, turn the VAE to float32 and repeat."""
        weight = self.post_quant_conv.weight
        out = function(x.to(weight.dtype))
        results = out if isinstance(out, tuple) else (out,)
        if weight.dtype != torch.float32 and not all(bool(r.isfinite().all()) for r in results):
            self.float()
            return function(x.float())
        return out
