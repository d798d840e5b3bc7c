"""The text and image encoder of Shapes, the toy data set: its file, and how well it tells captions and frames apart."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

import torch
from torch import Tensor

from animatediff.checkpoints.files import file_sha256, read_state_dict
from animatediff.checkpoints.small_clip_files import CONFIG_KEY, build_small_clip
from animatediff.config.networks import SmallCLIPConfig
from animatediff.metrics.clip_metrics import Encoder
from animatediff.metrics.encoders import LocalCLIP
from animatediff.metrics.references import cover
from animatediff.models.small_clip import SmallCLIP
from animatediff.models.tokenizer import Tokenizer
from animatediff.utils import UserError
from animatediff.world.shapes import (
    BACKGROUNDS,
    COLORS,
    FRAMES,
    MOTIONS,
    SHAPES,
    SIZES,
    TEMPLATES,
    Scene,
    make_scene,
    render,
)

WORLD = "world"  # the name of the bundled encoder
BUNDLED = "assets/shapes_encoder.safetensors"
LABELS = {"color": COLORS, "shape": SHAPES, "background": BACKGROUNDS, "motion": MOTIONS}


def load_encoder(name: str, *, device: torch.device | None = None) -> Encoder:
    """The encoder of a name.

    Args:
        name: "world", the bundled one; a file that stage `shapes_encoder` wrote; or a path that `LocalCLIP` takes.
        device: of a `LocalCLIP`.

    Raises:
        UserError: what `LocalCLIP` refuses.
    """
    if name == WORLD:
        return WorldEncoder.from_file()
    if Path(name).is_file() and CONFIG_KEY in read_state_dict(name).metadata:
        return WorldEncoder.from_file(name)
    return LocalCLIP(name, device=device)


class WorldEncoder:
    """An `Encoder` (`clip_metrics`) that knows the words and the pictures of Shapes only."""

    def __init__(self, model: SmallCLIP, name: str = "world"):
        self.model, self.name = model.eval(), name
        self._tokenizer = Tokenizer()

    @classmethod
    def from_file(cls, path: str | Path | None = None) -> WorldEncoder:
        """Read a file of stage `shapes_encoder`; by default the bundled one.

        Raises:
            UserError: the file is missing, damaged or something else.
        """
        bundled = path is None
        path = Path(str(files("animatediff").joinpath(BUNDLED))) if bundled else Path(path)
        if not path.is_file():
            raise UserError(f"got no encoder at {path}: train stage shapes_encoder, or give a local CLIP's folder")
        model = build_small_clip(read_state_dict(path), path)
        return cls(model, "world" if bundled else f"{path} (sha256 {file_sha256(path)[:16]})")

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        """Unit embeddings (n, d) of pictures (n, 3, H, W) in [-1, 1], shrunk and cropped to 64 x 64."""
        return self.model.encode_images(cover(images, self.model.config.size))

    @torch.no_grad()
    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """Unit embeddings (n, d) of texts; what goes beyond 30 tokens is cut off."""
        return self.model.encode_tokens(tokenize(self._tokenizer, texts, self.model.config.max_length))


def new_small_clip(config: SmallCLIPConfig) -> SmallCLIP:
    """Fresh weights, with rows for every token that captions can have."""
    words = [word for table in (COLORS, SHAPES, BACKGROUNDS, SIZES) for word in table]
    phrases = [phrase for phrases in MOTIONS.values() for phrase in phrases]
    blank = dict.fromkeys(("size", "color", "shape", "motion", "background"), "")
    templates = [template.format(**blank) for template in TEMPLATES]
    tokens = Tokenizer()([*words, *phrases, *templates]).unique()
    return SmallCLIP(config, tokens)


def tokenize(tokenizer: Tokenizer, texts: Sequence[str], max_length: int) -> Tensor:
    """Ids (n, l) of texts, what goes beyond `max_length` tokens cut off; l is what the longest of them needs."""
    ids = tokenizer(list(texts), max_length=max_length)[:, 0]
    return ids[:, : int((ids != tokenizer.end_id).sum(dim=1).max()) + 1]


def draw_frames(scenes: Sequence[Scene], generator: torch.Generator) -> Tensor:
    """One frame (n, 3, 64, 64) of each scene, drawn evenly."""
    which = torch.randint(FRAMES, (len(scenes), 1), generator=generator)
    return render(list(scenes), only_frames=which.numpy())[:, 0]


def matches(scenes: Sequence[Scene]) -> Tensor:
    """(n, n) of bool: the caption of scene i is true of the frames of scene j."""
    labels = [(s.color, s.shape, s.background, s.motion) for s in scenes]
    said = [s.size if s.size in s.caption.split() else "" for s in scenes]
    return torch.tensor(
        [
            [labels[i] == labels[j] and said[i] in ("", scenes[j].size) for j in range(len(scenes))]
            for i in range(len(scenes))
        ]
    )


def retrieval(encoder: WorldEncoder, *, count: int = 500, seed: int = 1) -> dict[str, float]:
    """How well frames of the scenes of series `seed` and captions find each other.

    Returns:
        In percent: `caption`: the caption nearest to a frame, out of `count`, is true of it; `frame`: the frame nearest
        to a caption; and for each label of a scene: of the captions that differ from its own in this label alone, its
        own is nearest to the frame. (Other motions may also be said in another way: sizes belong to some only.)
    """
    scenes = [make_scene(i, seed=seed) for i in range(count)]
    frames = encoder.encode_images(draw_frames(scenes, torch.Generator().manual_seed(seed)))
    cosines = encoder.encode_texts([scene.caption for scene in scenes]) @ frames.T
    true = matches(scenes)
    found = {
        "caption": true[cosines.argmax(dim=0), torch.arange(count)],
        "frame": true[torch.arange(count), cosines.argmax(dim=1)],
    }
    for label, values in LABELS.items():
        captions = [make_scene(i, seed=seed, **{label: value}).caption for i in range(count) for value in values]
        texts = encoder.encode_texts(captions).unflatten(0, (count, len(values)))
        best = torch.einsum("nvd,nd->nv", texts, frames).argmax(dim=1)
        found[label] = best == torch.tensor([list(values).index(getattr(scene, label)) for scene in scenes])
    return {name: round(100 * float(right.float().mean()), 1) for name, right in found.items()}
