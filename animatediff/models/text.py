"""Token ids to text embeddings: the CLIP text encoder (Radford et al. 2021, arXiv 2103.00020)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention

from animatediff.config.networks import TextConfig
from animatediff.models.prompt_weighting import weigh_states
from animatediff.utils import UserError


def quick_gelu(x: Tensor) -> Tensor:
    """x sigmoid(1.702 x), the approximation of GELU that OpenAI's CLIP was trained with."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"quick_gelu": quick_gelu, "gelu": gelu}


class TextEncoder(nn.Module):
    """CLIP's causal text transformer, built from sizes alone.

    Parameters are named as in checkpoints and in transformers' CLIPTextModelWithProjection:
    `text_model.embeddings.token_embedding.weight`, `text_model.encoder.layers.0…`, `text_projection.weight`.
    There are no buffers, so it can be built on the meta device and filled with `load_state_dict(assign=True)`.

    Raises:
        UserError: the number of heads does not divide the width, or an unknown activation.
    """

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        if config.num_heads < 1 or config.width % config.num_heads:
            raise UserError(
                f"got {config.num_heads} heads for a text encoder of width {config.width}, expected a divisor of it: "
                "set text_num_heads in the checkpoint's metadata"
            )
        if config.activation not in ACTIVATIONS:
            raise UserError(
                f"got the activation {config.activation!r} of a text encoder, expected {' or '.join(ACTIVATIONS)}: "
                "set text_activation in the checkpoint's metadata"
            )
        self.config = config
        self.text_model = _Transformer(config)
        if config.projection_width:
            self.text_projection = nn.Linear(config.width, config.projection_width, bias=False)

    def forward(self, token_ids: Tensor, *, clip_skip: int = 1, final_norm: bool = True) -> Tensor:
        """Embed one chunk per row.

        Padding is attended to like any token, as Stable Diffusion was trained.

        Args:
            token_ids: int64 ids (n, l), l at most `config.max_length`.
            clip_skip: the layer to take, from the end: 1 the last, 2 the one before it, … Prompts and negative prompts
                take the same.
            final_norm: apply the final layer norm to it, as SD 1.x does and SDXL does not.

        Returns:
            That layer's states (n, l, d).

        Raises:
            UserError: l exceeds `config.max_length`, or there is no such layer.
        """
        self.check_clip_skip(clip_skip)
        states = self.hidden_states(token_ids)[-clip_skip]
        return self.text_model.final_layer_norm(states) if final_norm else states

    def hidden_states(self, token_ids: Tensor) -> list[Tensor]:
        """The embedded tokens of ids (n, l) and what each layer makes of them, all (n, l, d), without the final norm.

        Raises:
            UserError: l exceeds `config.max_length`.
        """
        if token_ids.shape[-1] > self.config.max_length:
            raise UserError(
                f"got {token_ids.shape[-1]} tokens, expected at most {self.config.max_length}: "
                f"tokenize with max_length={self.config.max_length}"
            )
        return self.text_model(token_ids)

    def pool(self, last_states: Tensor, token_ids: Tensor) -> Tensor:
        """The vector (n, p) of each row: its first end token's state after the final norm, projected where there is a
        projection.

        Args:
            last_states: of the last layer, `hidden_states(token_ids)[-1]` (n, l, d).
            token_ids: (n, l).
        """
        end = (token_ids == self.config.end_token_id).int().argmax(dim=1)
        pooled = self.text_model.final_layer_norm(last_states)[torch.arange(len(end), device=end.device), end]
        return self.text_projection(pooled) if self.config.projection_width else pooled

    def check_clip_skip(self, clip_skip: int) -> None:
        """Raises UserError unless there is such a layer."""
        if not 1 <= clip_skip <= self.config.layers:
            raise UserError(
                f"clip_skip: got {clip_skip}, expected 1 (the last layer) to {self.config.layers}, the layers of the "
                "text encoder"
            )

    def encode(
        self, token_ids: Tensor, *, weights: Tensor | None = None, clip_skip: int = 1, final_norm: bool = True
    ) -> Tensor:
        """Embed prompts of several chunks, each chunk on its own, and join them along the tokens.

        Args:
            token_ids: int64 ids (n, chunks, l) from `Tokenizer`.
            weights: of every token (n, chunks, l), from `Tokenizer.weighted`.
            clip_skip, final_norm: as of `forward`.

        Returns:
            The context of the UNet's cross-attention (n, chunks * l, d).
        """
        rows = rearrange(token_ids, "n c l -> (n c) l")
        states = self(rows, clip_skip=clip_skip, final_norm=final_norm)
        if weights is not None:
            states = weigh_states(states, rearrange(weights, "n c l -> (n c) l"))
        return rearrange(states, "(n c) l d -> n (c l) d", c=token_ids.shape[1])

    def add_tokens(self, vectors: Tensor) -> list[int]:
        """Learn further tokens, by their vectors (k, d); returns their ids."""
        embeddings, known = self.text_model.embeddings, self.config.vocab_size
        table = embeddings.token_embedding.weight
        longer = table.new_empty(known + len(vectors), self.config.width)
        longer[:known], longer[known:] = table.detach(), vectors.to(table)
        embeddings.token_embedding = nn.Embedding.from_pretrained(longer, freeze=not table.requires_grad)
        self.config = replace(self.config, vocab_size=known + len(vectors))
        return list(range(known, known + len(vectors)))

    def linear_layers(self) -> dict[str, nn.Linear]:
        """Every linear layer by its checkpoint name, e.g. `text_model.encoder.layers.0.self_attn.q_proj`."""
        return {name: module for name, module in self.named_modules() if isinstance(module, nn.Linear)}


def equally_long(contexts: Sequence[Tensor]) -> list[Tensor]:
    """Contexts (n, l, d) of different l as ones of the same, the least common multiple, each repeated along the tokens.

    Softmax over keys that are all there r times is the softmax over the keys: in one batch every clip sees its own
    prompt as it does alone, up to rounding. Padding instead would be attended to.
    """
    length = math.lcm(*(context.shape[1] for context in contexts))
    return [context.repeat(1, length // context.shape[1], 1) for context in contexts]


class _Transformer(nn.Module):
    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        tokens, positions = (nn.Embedding(n, config.width) for n in (config.vocab_size, config.max_length))
        self.embeddings = nn.ModuleDict({"token_embedding": tokens, "position_embedding": positions})
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(_Layer(config) for _ in range(config.layers))})
        self.final_layer_norm = nn.LayerNorm(config.width)
        for table in (tokens, positions):
            nn.init.normal_(table.weight, std=0.02)

    def forward(self, token_ids: Tensor) -> list[Tensor]:
        positions = torch.arange(token_ids.shape[-1], device=token_ids.device)[None]
        embeddings = self.embeddings
        states = [embeddings.token_embedding(token_ids) + embeddings.position_embedding(positions)]
        for layer in self.encoder.layers:
            states.append(layer(states[-1]))
        return states


class _Layer(nn.Module):
    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.num_heads, self.activation = config.num_heads, ACTIVATIONS[config.activation]
        width = config.width
        self.self_attn = nn.ModuleDict({f"{name}_proj": nn.Linear(width, width) for name in ("k", "v", "q", "out")})
        self.layer_norm1 = nn.LayerNorm(width)
        fc1, fc2 = nn.Linear(width, config.mlp_width), nn.Linear(config.mlp_width, width)
        self.mlp = nn.ModuleDict({"fc1": fc1, "fc2": fc2})
        self.layer_norm2 = nn.LayerNorm(width)
        small = (2 * width * config.layers) ** -0.5  # OpenAI's start: less of each layer, the more of them add up
        stds = {"fc1": (2 * width) ** -0.5, "out_proj": width**-0.5}
        for name, layer in [*self.self_attn.items(), *self.mlp.items()]:
            nn.init.normal_(layer.weight, std=stds.get(name, small))
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        attn, mlp, normed = self.self_attn, self.mlp, self.layer_norm1(x)
        q, k, v = (
            rearrange(project(normed), "n l (nh dh) -> n nh l dh", nh=self.num_heads)
            for project in (attn.q_proj, attn.k_proj, attn.v_proj)
        )
        mixed = scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + attn.out_proj(rearrange(mixed, "n nh l dh -> n l (nh dh)"))
        return x + mlp.fc2(self.activation(mlp.fc1(self.layer_norm2(x))))
