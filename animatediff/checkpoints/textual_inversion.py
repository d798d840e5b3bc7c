"""Textual inversions (Gal et al. 2022, arXiv 2208.01618): words whose vectors were trained, into a text encoder.

Files, by their keys:
    string_to_param: {*: (k, d)}     the original code and AUTOMATIC1111's web UI, .pt
    emb_params: (k, d)               .safetensors of later trainers
    <token>: (d,) or (k, d)          diffusers, .bin and .safetensors
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from animatediff.checkpoints.files import file_sha256, read_state_dict
from animatediff.checkpoints.identify import embedding_vectors, identify_tensors, refusal
from animatediff.checkpoints.load import LoadReport
from animatediff.models.lora import LoRA
from animatediff.models.text import TextEncoder
from animatediff.models.tokenizer import Tokenizer
from animatediff.utils import UserError, naming


def load_textual_inversion(
    path: str | Path, text_encoder: TextEncoder, tokenizer: Tokenizer, *, name: str = ""
) -> LoadReport:
    """Let a word of the prompts stand for the vectors of a file.

    Args:
        path: .pt, .bin or .safetensors.
        text_encoder: gets the vectors as further tokens.
        tokenizer: gets the word.
        name: the word; by default the file's stem, and the token that a diffusers file names, if it does.

    Raises:
        UserError: another kind of file, vectors of another width, or a word that is there already.
    """
    path = Path(path)
    file = read_state_dict(path)
    info = identify_tensors(file.tensors, file.metadata, path=path)
    vectors = embedding_vectors(file.tensors)
    if info.kind != "textual-inversion" or vectors is None:
        raise refusal(info, "a textual inversion for SD 1.x")
    own = next(key for key in file.tensors if not key.startswith("string_to_token."))
    words = [name or path.stem]
    if not name and own not in ("emb_params", "clip_l", path.stem) and not own.startswith("string_to_param."):
        words.append(own)
    with naming(path):
        ids = _add_words(words, vectors, text_encoder, tokenizer)
    note = f"{len(ids)} vector{'s' * (len(ids) > 1)}, in prompts as {' or '.join(words)}"
    return LoadReport(path, info.kind, None, file_sha256(path), 1, [note])


def load_bundled_embeddings(lora: LoRA, text_encoder: TextEncoder, tokenizer: Tokenizer) -> list[str]:
    """Let the words that are packed into a LoRA's file stand for their vectors. Returns the words.

    Raises:
        UserError: vectors of another width, or a word that is there already.
    """
    with naming(f"LoRA {lora.name}"):
        for word, vectors in lora.embeddings.items():
            _add_words([word], vectors, text_encoder, tokenizer)
    return list(lora.embeddings)


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
