"""Files of the small CLIP of Shapes, the toy data set <-> modules."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path

from torch import Tensor

from animatediff.checkpoints.files import LoadedFile, write_state_dict
from animatediff.checkpoints.load import build_blank, load_strictly
from animatediff.config.networks import SmallCLIPConfig
from animatediff.config.settings import build
from animatediff.models.small_clip import SmallCLIP
from animatediff.utils import UserError

MAX_SIZE = 1024  # pixels of a picture
CONFIG_KEY = "small_clip"  # of the file's metadata: the sizes, as JSON


def build_small_clip(file: LoadedFile, path: Path) -> SmallCLIP:
    """The network of a file that stage `shapes_encoder` wrote, in evaluation mode.

    Raises:
        UserError: the file is damaged or something else.
    """
    if CONFIG_KEY not in file.metadata:
        raise UserError(f"got {path}, expected an encoder of Shapes, the toy data set: train stage shapes_encoder")
    try:
        sizes = json.loads(file.metadata[CONFIG_KEY])
        config = build(SmallCLIPConfig, sizes, where=str(path))
        if sizes.keys() != asdict(config).keys():
            raise ValueError(f"sizes of {', '.join(sorted(sizes))}"[:100])
        return _with_weights(config, file.tensors, path)
    except UserError:
        raise
    except (ValueError, LookupError, TypeError, ArithmeticError, RuntimeError, AssertionError) as error:
        reason = " ".join(str(error).split())[:100]
        raise UserError(f"got {path}, a damaged encoder ({reason}): train stage shapes_encoder again") from None


def save_small_clip(model: SmallCLIP, path: Path, metadata: Mapping[str, str]) -> None:
    """Write the weights as float16, the sizes in the metadata."""
    tensors = {key: t.half() if t.is_floating_point() else t for key, t in model.state_dict().items()}
    write_state_dict(path, tensors, metadata={CONFIG_KEY: json.dumps(asdict(model.config)), **metadata})


def _with_weights(config: SmallCLIPConfig, tensors: Mapping[str, Tensor], path: Path) -> SmallCLIP:
    """Raises: ValueError and the like where the tensors are no weights of these sizes."""
    if config.text_layers + len(config.channels) > len(tensors):
        raise ValueError("more layers than tensors")
    if not config.patch <= config.size <= MAX_SIZE:
        raise ValueError(f"pictures of {config.size} pixels")
    ready = {key: t.float() for key, t in tensors.items()} | {"tokens": tensors["tokens"].long()}
    return load_strictly(build_blank(partial(SmallCLIP, config, ready["tokens"])), ready, "encoder of Shapes", path)
