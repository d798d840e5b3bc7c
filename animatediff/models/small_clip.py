"""A small CLIP (Radford et al. 2021): pictures and captions to vectors of length one, alike where they belong together.

The encoder of Shapes, the toy data set. It has rows for the tokens it was trained with only, so its file is small,
and it is made of torch's own layers, so loading it takes no time.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from animatediff.config.networks import SmallCLIPConfig

GROUPS = 8  # of the GroupNorms
TEMPERATURE = 0.07  # of the contrastive loss at the start of the training
TAIL = 5  # layers of the image encoder that make one vector of the cells
MAX_SCALE = 100.0  # of the inverse temperature, as in CLIP


class SmallCLIP(nn.Module):
    """Two towers.

    Args:
        config: the sizes.
        tokens: ids (n,) of CLIP's tokenizer that it knows, in ascending order; all others share one row.
    """

    tokens: Tensor

    def __init__(self, config: SmallCLIPConfig, tokens: Tensor):
        super().__init__()
        self.config, width = config, config.width
        self.register_buffer("tokens", tokens.long())
        self.image_encoder = _image_encoder(config)
        self.token_embedding = nn.Embedding(len(tokens) + 1, width)
        self.position_embedding = nn.Parameter(nn.init.normal_(torch.empty(config.max_length, width), std=0.1))
        layer = nn.TransformerEncoderLayer(
            width, config.text_heads, 2 * width, dropout=0.0, activation=F.gelu, batch_first=True, norm_first=True
        )
        self.text_encoder = nn.TransformerEncoder(
            layer, config.text_layers, norm=nn.LayerNorm(width), enable_nested_tensor=False
        )
        self.text_projection = nn.Linear(width, width, bias=False)
        self.log_scale = nn.Parameter(torch.tensor(-math.log(TEMPERATURE)))

    def encode_images(self, images: Tensor) -> Tensor:
        """Embeddings (n, d) of length one of pictures (n, 3, `size`, `size`) in [-1, 1]."""
        return F.normalize(self.image_encoder(images), dim=-1)

    def image_tokens(self, images: Tensor) -> Tensor:
        """What the last convolution makes of pictures, cell by cell of a coarse grid: (n, cells, channels[-1])."""
        return self.image_encoder[:-TAIL](images).flatten(2).mT

    def encode_tokens(self, token_ids: Tensor) -> Tensor:
        """Embeddings (n, d) of length one of texts, as int64 ids (n, l) of the tokenizer, l at most `max_length`."""
        rows = torch.searchsorted(self.tokens, token_ids.contiguous()).clamp(max=len(self.tokens) - 1)
        rows = torch.where(self.tokens[rows] == token_ids, rows + 1, 0)
        places = torch.arange(token_ids.shape[1], device=token_ids.device)
        end = token_ids.argmax(dim=1)  # the first of the highest ids: CLIP's end token, after which all is padding
        x = self.token_embedding(rows) + self.position_embedding[: len(places)]
        x = self.text_encoder(x, src_key_padding_mask=places > end[:, None])
        return F.normalize(self.text_projection(x[torch.arange(len(end)), end]), dim=-1)

    @property
    def scale(self) -> Tensor:
        """The factor of the cosines in the contrastive loss."""
        return self.log_scale.exp().clamp(max=MAX_SCALE)


def _image_encoder(config: SmallCLIPConfig) -> nn.Sequential:
    layers: list[nn.Module] = []
    before = 3
    for level, channels in enumerate(config.channels):
        size, stride = (3, 2) if level else (config.patch, config.patch)
        layers.append(nn.Conv2d(before, channels, size, stride=stride, padding=1 if level else 0))
        layers.append(_Residual(channels))
        before = channels
    tail = [nn.GroupNorm(GROUPS, before), nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, *tail, nn.Linear(before, config.width, bias=False))


class _Residual(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.norm = nn.GroupNorm(GROUPS, channels)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(F.silu(self.norm(x)))
