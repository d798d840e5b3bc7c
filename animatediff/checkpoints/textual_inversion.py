"""Textual inversions (Gal et al. 2022, arXiv 2208.01618): words whose vectors were trained, into a text encoder.

Files, by their keys:
    string_to_param: {*: (k, d)}     the original code and AUTOMATIC1111's web UI, .pt
    emb_params: (k, d)               .safetensors of later trainers
    <token>: (d,) or (k, d)          diffusers, .bin and .safetensors
    clip_l: (k, 768), clip_g: (k, 1280)   SDXL, a vector for each of its two text encoders
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from torch import Tensor

from animatediff.checkpoints.files import StateDict, file_sha256, read_state_dict, write_state_dict
from animatediff.checkpoints.identify import FileInfo, identify_tensors, refusal
from animatediff.checkpoints.kind_rules import embedding_vectors
from animatediff.checkpoints.load import LoadReport
from animatediff.checkpoints.weight_checks import check_finite
from animatediff.config.values import EMBEDDING
from animatediff.models.lora import LoRA
from animatediff.models.text import TextEncoder
from animatediff.models.tokenizer import Tokenizer
from animatediff.utils import UserError, naming

SDXL_KEYS = ("clip_l", "clip_g")  # of the first and the second text encoder


def load_textual_inversion(
    path: str | Path,
    text_encoder: TextEncoder | None,
    tokenizer: Tokenizer,
    *,
    second: tuple[TextEncoder, Tokenizer] | None = None,
    name: str = "",
) -> LoadReport:
    """Let a word of the prompts stand for the vectors of a file.

    Args:
        path: .pt, .bin or .safetensors.
        text_encoder: gets the vectors as further tokens; None of SDXL's refiner, which has the second alone.
        tokenizer: gets the word.
        second: SDXL's second text encoder and tokenizer, which get vectors of their own.
        name: the word; by default the file's stem, and the token that a diffusers file names, if it does.

    Raises:
        UserError: another kind of file, vectors of another width, or a word that is there already.
    """
    path = Path(path)
    info, tensors, vectors, own = _read(path)
    words = [name or path.stem]
    if not name and own not in ("", path.stem):
        words.append(own)
    with naming(path):
        if (info.kind == "sdxl-textual-inversion") != (second is not None):
            _refuse_family("SDXL" if second is None else "SD 1.x")
        if second is None:
            assert text_encoder is not None
            ids = _add_words(words, vectors, text_encoder, tokenizer)
        else:
            ids = _add_pairs(words, tensors, (text_encoder, tokenizer), second)
    applied = 1 if second is None else 2
    return LoadReport(path, info.kind, None, file_sha256(path), applied, [_note(words, ids)])


def write_textual_inversion(source: Path, target: Path, *, diffusers: bool) -> None:
    """Vectors for SD 1.x in other keys: diffusers' token, which is the file's own or made of its name, or `emb_params`.

    Raises:
        UserError: another kind of file, also one for SDXL, which has one spelling.
    """
    info, _, vectors, own = _read(source)
    if info.kind == "sdxl-textual-inversion":
        raise UserError(f"{source}: got a textual inversion for SDXL, expected one for SD 1.x, which has two spellings")
    key = (own or f"<{source.stem}>") if diffusers else "emb_params"
    write_state_dict(target, {key: vectors.reshape(-1, vectors.shape[-1])})


def save_words(encoders: Sequence[tuple[TextEncoder, Tokenizer]], folder: Path) -> dict[str, Path]:
    """Write the words that were added to a text encoder, or to both of SDXL: word -> file in `folder`."""
    keys = SDXL_KEYS if len(encoders) == 2 else ("emb_params",)
    files = {}
    for number, word in enumerate(encoders[0][1].own_words):
        vectors = {
            key: encoder.text_model.embeddings.token_embedding.weight[tokenizer.own_words[word]]
            for key, (encoder, tokenizer) in zip(keys, encoders, strict=True)
        }
        files[word] = write_state_dict(folder / f"embedding_{number}.safetensors", vectors)
    return files


def _read(path: Path) -> tuple[FileInfo, StateDict, Tensor, str]:
    """What a file is, its tensors, the vectors of its (second) text encoder, and the token that it names, if any."""
    file = read_state_dict(path)
    info = identify_tensors(file.tensors, file.metadata, path=path)
    vectors = embedding_vectors(file.tensors)
    if vectors is None or info.kind not in EMBEDDING.kinds:
        raise refusal(info, EMBEDDING.what)
    check_finite(file.tensors, path)
    own = next(key for key in file.tensors if not key.startswith("string_to_token."))
    named = own not in ("emb_params", *SDXL_KEYS) and not own.startswith("string_to_param.")
    return info, file.tensors, vectors, own if named else ""


def _refuse_family(made: str) -> NoReturn:
    base = "SD 1.x" if made == "SDXL" else "SDXL"
    raise UserError(f"got a textual inversion for {made} with an {base} base: use one that was made for {base}")


def _note(words: list[str], ids: list[int]) -> str:
    return f"{len(ids)} vector{'s' * (len(ids) > 1)}, in prompts as {' or '.join(words)}"


def _add_pairs(words: list[str], tensors: StateDict, *encoders: tuple[TextEncoder | None, Tokenizer]) -> list[int]:
    """The words into the encoders of SDXL, each of which has vectors of its own."""
    counts = {key: len(tensors[key].reshape(-1, tensors[key].shape[-1])) for key in SDXL_KEYS if key in tensors}
    if counts.keys() != set(SDXL_KEYS) or len(set(counts.values())) != 1:
        raise UserError(
            f"got vectors {counts}, expected as many of {' and '.join(SDXL_KEYS)}: use a textual inversion that was "
            "made for both text encoders of SDXL"
        )
    for key, (text_encoder, tokenizer) in zip(SDXL_KEYS, encoders, strict=True):
        if text_encoder is not None:
            ids = _add_words(words, tensors[key], text_encoder, tokenizer)
    return ids


def load_bundled_embeddings(
    lora: LoRA,
    text_encoder: TextEncoder | None,
    tokenizer: Tokenizer,
    *,
    second: tuple[TextEncoder, Tokenizer] | None = None,
) -> list[str]:
    """Let the words that are packed into a LoRA's file stand for their vectors. Returns a note on each.

    Args: as of `load_textual_inversion`.

    Raises:
        UserError: vectors of another family or width, or a word that is there already.
    """
    with naming(f"LoRA {lora.name}"):
        return [
            _note([word], _add(word, vectors, text_encoder, tokenizer, second))
            for word, vectors in lora.embeddings.items()
        ]


def _add(
    word: str,
    vectors: StateDict,
    text_encoder: TextEncoder | None,
    tokenizer: Tokenizer,
    second: tuple[TextEncoder, Tokenizer] | None,
) -> list[int]:
    if (made_for_two := "clip_g" in vectors) != (second is not None):
        _refuse_family("SDXL" if made_for_two else "SD 1.x")
    if second is not None:
        return _add_pairs([word], vectors, (text_encoder, tokenizer), second)
    assert text_encoder is not None
    if len(vectors) != 1:
        raise UserError(f"got {len(vectors)} tensors for the word {word}, expected one: use another file")
    return _add_words([word], next(iter(vectors.values())), text_encoder, tokenizer)


def _add_words(words: list[str], vectors: Tensor, text_encoder: TextEncoder, tokenizer: Tokenizer) -> list[int]:
    if vectors.shape[-1] != (width := text_encoder.config.width):
        raise UserError(
            f"got vectors of {vectors.shape[-1]} numbers, expected {width} as the text encoder has: use a textual "
            "inversion that was made for this model"
        )
    ids = text_encoder.add_tokens(vectors.reshape(-1, width))
    for word in words:
        tokenizer.add_word(word, ids)
    return ids
