"""Prompt to text embedding: the CLIP tokenizer, offline, and the CLIP text encoder (Radford et al. 2021)."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import torch
from einops import rearrange
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as BPETokenizer
from torch import Tensor, nn

from animatediff.config.networks import TextConfig
from animatediff.models.prompt_weighting import Section, weigh_states
from animatediff.utils import UserError

START, END = "<|startoftext|>", "<|endoftext|>"
WORD_END = "</w>"
# Special tokens, English contractions, runs of letters, single digits, runs of anything else that is not blank.
WORD_PATTERN = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"

Merge = tuple[str, str]


def read_bundled_merges() -> list[Merge]:
    """The 48,894 merges of OpenAI's CLIP, in order of priority."""
    text = gzip.decompress(files("animatediff").joinpath("assets/clip_merges.txt.gz").read_bytes()).decode("utf-8")
    return parse_merges(text.splitlines())


def parse_merges(lines: list[str]) -> list[Merge]:
    """Pairs from the lines of a merges.txt; its `#version` line is skipped.

    Raises:
        UserError: a line is not two tokens.
    """
    pairs = [tuple(line.split()) for line in lines if line.strip() and not line.startswith("#version")]
    if wrong := [pair for pair in pairs if len(pair) != 2]:
        raise UserError(f"got the merge {' '.join(wrong[0])!r}, expected two tokens: check the model's merges.txt")
    return pairs


def build_vocabulary(merges: list[Merge]) -> dict[str, int]:
    """Token -> id: 256 bytes, the same at a word's end, one token per merge, start and end (49,408 for CLIP).

    Bytes are spelled as printable characters: Latin-1 ones stand for themselves and come first,
    the others follow as the code points from 256 up.
    """
    printable = [chr(b) for b in (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))]
    alphabet = printable + [chr(256 + i) for i in range(256 - len(printable))]
    tokens = alphabet + [c + WORD_END for c in alphabet] + [left + right for left, right in merges] + [START, END]
    return {token: i for i, token in enumerate(tokens)}


class Tokenizer:
    """CLIP's byte-pair tokenizer; without arguments, OpenAI's table from `animatediff/assets`.

    Args:
        merges: pairs to join, in order of priority.
        vocabulary: token -> id; derived from the merges where not given.
        added_tokens: whole words -> ids that continue the vocabulary, kept in one piece wherever they occur.
        pad_token: fills a chunk after its end token (`<|endoftext|>` for every SD 1.x model).

    Raises:
        UserError: a vocabulary that lacks the start, end or padding token or a merged one, or added ids that
            leave a gap.
    """

    def __init__(
        self,
        merges: list[Merge] | None = None,
        vocabulary: dict[str, int] | None = None,
        *,
        added_tokens: dict[str, int] | None = None,
        pad_token: str = END,
    ) -> None:
        merges = read_bundled_merges() if merges is None else merges
        vocabulary = build_vocabulary(merges) if vocabulary is None else vocabulary
        self._bpe = _build_bpe(merges, vocabulary)
        _add_tokens(self._bpe, added_tokens or {})
        self.vocab_size = self._bpe.get_vocab_size()
        self.start_id, self.end_id, self.pad_id = (self._special_id(token) for token in (START, END, pad_token))
        self._own_words: dict[str, list[int]] = {}

    @classmethod
    def from_folder(cls, folder: str | Path) -> Tokenizer:
        """Read a `tokenizer/` folder of a diffusers model (vocab.json + merges.txt, or tokenizer.json alone).

        Raises:
            UserError: the folder holds neither, or its files do not belong together.
        """
        folder = Path(folder)
        added = _read_json(folder / "added_tokens.json")
        if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
            vocabulary = _read_json(folder / "vocab.json")
            merges = parse_merges((folder / "merges.txt").read_text(encoding="utf-8").splitlines())
        elif (folder / "tokenizer.json").is_file():
            saved = _read_json(folder / "tokenizer.json")
            vocabulary = saved["model"]["vocab"]
            merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in saved["model"]["merges"]]
            added |= {token["content"]: token["id"] for token in saved.get("added_tokens", [])}
        else:
            raise UserError(
                f"got {folder} without a tokenizer, expected vocab.json and merges.txt (or tokenizer.json) in it: "
                "restore them, or remove the folder to use the bundled CLIP table"
            )
        pad = _read_json(folder / "tokenizer_config.json").get("pad_token") or END
        return cls(merges, vocabulary, added_tokens=added, pad_token=pad["content"] if isinstance(pad, dict) else pad)

    def __call__(self, prompts: list[str], *, max_length: int = 77) -> Tensor:
        """Token ids of prompts of any length, cut into chunks that the encoder can take.

        Each chunk is start token, up to `max_length - 2` tokens, end token, padding. All prompts of one call
        get as many chunks as the longest needs, so a prompt and its negative prompt belong in one call.

        Args:
            prompts: n texts; blank ones are fine.
            max_length: tokens of a chunk, start and end included (`TextConfig.max_length`).

        Returns:
            int64 ids (n, chunks, max_length).

        Raises:
            UserError: `prompts` is not a list of texts, or `max_length` leaves no room for a token.
        """
        if isinstance(prompts, str) or not all(isinstance(prompt, str) for prompt in prompts):
            raise UserError(f"got prompts {prompts!r}, expected a list of texts: quote each prompt, one entry each")
        return self.weighted([[[(prompt, 1.0)]] for prompt in prompts], max_length=max_length)[0]

    def weighted(self, prompts: Sequence[Sequence[Section]], *, max_length: int = 77) -> tuple[Tensor, Tensor]:
        """As `__call__`, of prompts whose texts have weights. Every section begins a new chunk.

        A word of several ids (`add_word`) that fits into a chunk is never cut in two.

        Args:
            prompts: n prompts, each as its sections (`prompt_weighting.parse_prompt`).

        Returns:
            int64 ids and float32 weights, both (n, chunks, max_length); start, end and padding weigh 1.

        Raises:
            UserError: `max_length` leaves no room for a token.
        """
        if max_length < 3:
            raise UserError(f"got max_length {max_length}, expected at least 3: start token, a token, end token")
        rows = [
            [chunk for section in sections for chunk in self._chunks(section, max_length - 2)] for sections in prompts
        ]
        shape = (len(rows), max([1, *map(len, rows)]), max_length)
        ids, weights = torch.full(shape, self.pad_id), torch.ones(shape)
        for n, row in enumerate(rows):
            for c in range(shape[1]):
                chunk = row[c] if c < len(row) else []
                piece = [self.start_id, *(token for token, _ in chunk), self.end_id]
                ids[n, c, : len(piece)] = torch.tensor(piece)
                weights[n, c, 1 : len(chunk) + 1] = torch.tensor([weight for _, weight in chunk])
        return ids, weights

    def add_word(self, word: str, ids: list[int]) -> None:
        """Let a word of the prompts stand for these ids, wherever it occurs, in capitals or not.

        Raises:
            UserError: the word is blank, or there already.
        """
        key = word.strip().lower()
        if not key or key in self._own_words:
            what = f"the word {word!r} twice" if key else "a blank word"
            raise UserError(f"got {what}, expected one of its own: give it a name")
        self._own_words[key] = ids

    def tokenize(self, prompt: str) -> list[int]:
        """The ids of one prompt, of any length, without start and end tokens."""
        return [token for word in self._words(prompt) for token in word]

    def _chunks(self, section: Section, room: int) -> list[list[tuple[int, float]]]:
        chunks: list[list[tuple[int, float]]] = [[]]
        for text, weight in section:
            for word in self._words(text):
                if len(chunks[-1]) + min(len(word), room) > room:
                    chunks.append([])
                for token in word:
                    if len(chunks[-1]) == room:
                        chunks.append([])
                    chunks[-1].append((token, weight))
        return chunks

    def _words(self, text: str) -> Iterator[list[int]]:
        """The ids that belong together: those of an added word, any other token alone."""
        for i, part in enumerate(self._split(text)):
            if i % 2:
                yield self._own_words[part]
            else:
                clean = part.encode("utf-8", errors="replace").decode("utf-8")  # half a surrogate pair is no text
                yield from ([token] for token in self._bpe.encode(clean, add_special_tokens=False).ids)

    def _split(self, text: str) -> list[str]:
        """What is between added words, and after each of these but the last the word that follows."""
        if not self._own_words:
            return [text]
        longest_first = sorted(self._own_words, key=len, reverse=True)
        return re.split(f"({'|'.join(map(_whole_word, longest_first))})", text.lower())

    def _special_id(self, token: str) -> int:
        index = self._bpe.token_to_id(token)
        if index is None:
            raise UserError(f"got a vocabulary without {token}, expected CLIP's: check the model's tokenizer folder")
        return index


def _build_bpe(merges: list[Merge], vocabulary: dict[str, int]) -> BPETokenizer:
    for merge in merges:
        if "".join(merge) not in vocabulary or not all(part in vocabulary for part in merge):
            raise UserError(
                f"got the merge {' '.join(merge)!r} of tokens the vocabulary lacks, expected a vocabulary with all "
                "of them: take merges and vocabulary from the same model"
            )
    bpe = BPETokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=merges,
            continuing_subword_prefix="",
            end_of_word_suffix=WORD_END,
            unk_token=END,
        )
    )
    bpe.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORD_PATTERN), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    bpe.add_special_tokens([AddedToken(token, normalized=False) for token in (START, END) if token in vocabulary])
    return bpe


def _add_tokens(bpe: BPETokenizer, tokens: dict[str, int]) -> None:
    for token, index in sorted(tokens.items(), key=lambda item: item[1]):
        bpe.add_tokens([AddedToken(token, normalized=token not in (START, END))])
        if (got := bpe.token_to_id(token)) != index:
            raise UserError(
                f"got added token {token} with id {index}, expected {got}: ids must continue the vocabulary"
            )


def _whole_word(word: str) -> str:
    """The pattern of a word that no letter or digit continues."""
    before, after = (r"\b" if re.match(r"\w", end) else "" for end in (word[0], word[-1]))
    return before + re.escape(word) + after


def _read_json(path: Path) -> dict:
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"got {path} with broken content ({error}), expected JSON: fetch the file again") from None


class TextEncoder(nn.Module):
    """CLIP's causal text transformer: transformers' CLIPTextModel, built from sizes alone.

    Parameters are named `text_model.embeddings.token_embedding.weight`, `text_model.encoder.layers.0…`,
    `text_model.final_layer_norm.weight`, as in checkpoints, whichever transformers version is installed.
    There are no buffers, so it can be built on the meta device and filled with `load_state_dict(assign=True)`.

    Raises:
        UserError: the number of heads does not divide the width.
    """

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        if config.num_heads < 1 or config.width % config.num_heads:
            raise UserError(
                f"got {config.num_heads} heads for a text encoder of width {config.width}, expected a divisor of it: "
                "set text_num_heads in the checkpoint's metadata"
            )
        self.config = config
        self.text_model = _build_clip(config)

    def forward(self, token_ids: Tensor, *, clip_skip: int = 1) -> Tensor:
        """Embed one chunk per row.

        Padding is attended to like any token, as Stable Diffusion was trained.

        Args:
            token_ids: int64 ids (n, l), l at most `config.max_length`.
            clip_skip: the layer to take, from the end: 1 the last, 2 the one before it, …

        Returns:
            That layer's states after the final layer norm (n, l, d).

        Raises:
            UserError: l exceeds `config.max_length`, or there is no such layer.
        """
        self.check_clip_skip(clip_skip)
        length = token_ids.shape[-1]
        if length > self.config.max_length:
            raise UserError(
                f"got {length} tokens, expected at most {self.config.max_length}: "
                f"tokenize with max_length={self.config.max_length}"
            )
        positions = torch.arange(length, device=token_ids.device)[None]
        if clip_skip == 1:
            return self.text_model(input_ids=token_ids, position_ids=positions).last_hidden_state
        out = self.text_model(input_ids=token_ids, position_ids=positions, output_hidden_states=True)
        return self.text_model.final_layer_norm(out.hidden_states[-clip_skip])

    def check_clip_skip(self, clip_skip: int) -> None:
        """Raises UserError unless there is such a layer."""
        if not 1 <= clip_skip <= self.config.layers:
            raise UserError(
                f"clip_skip: got {clip_skip}, expected 1 (the last layer) to {self.config.layers}, the layers of the "
                "text encoder"
            )

    def encode(self, token_ids: Tensor, *, weights: Tensor | None = None, clip_skip: int = 1) -> Tensor:
        """Embed prompts of several chunks, each chunk on its own, and join them along the tokens.

        Args:
            token_ids: int64 ids (n, chunks, l) from `Tokenizer`.
            weights: of every token (n, chunks, l), from `Tokenizer.weighted`.
            clip_skip: as of `forward`.

        Returns:
            The context of the UNet's cross-attention (n, chunks * l, d).
        """
        states = self(rearrange(token_ids, "n c l -> (n c) l"), clip_skip=clip_skip)
        if weights is not None:
            states = weigh_states(states, rearrange(weights, "n c l -> (n c) l"))
        return rearrange(states, "(n c) l d -> n (c l) d", n=token_ids.shape[0], c=token_ids.shape[1])

    def add_tokens(self, vectors: Tensor) -> list[int]:
        """Learn further tokens, by their vectors (k, d); returns their ids."""
        embeddings, known = self.text_model.embeddings, self.config.vocab_size
        table = embeddings.token_embedding.weight
        longer = torch.cat([table.detach(), vectors.to(table)])
        embeddings.token_embedding = nn.Embedding.from_pretrained(longer, freeze=not table.requires_grad)
        self.config = replace(self.config, vocab_size=known + len(vectors))
        return list(range(known, known + len(vectors)))

    def linear_layers(self) -> dict[str, nn.Linear]:
        """Every linear layer by its checkpoint name, e.g. `text_model.encoder.layers.0.self_attn.q_proj`."""
        return {name: module for name, module in self.named_modules() if isinstance(module, nn.Linear)}


def _build_clip(config: TextConfig) -> nn.Module:
    """The module that owns `embeddings`, `encoder` and `final_layer_norm`."""
    # Imported here: it takes seconds, and tokenizing or reading a checkpoint does without it.
    with torch.device("cpu"):  # not meta, where models are built: the import itself computes with tensors
        from transformers.models.clip.configuration_clip import CLIPTextConfig
        from transformers.models.clip.modeling_clip import CLIPTextModel

    model = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.width,
            intermediate_size=config.mlp_width,
            num_hidden_layers=config.layers,
            num_attention_heads=config.num_heads,
            max_position_embeddings=config.max_length,
            hidden_act=config.activation,
        )
    )
    inner = getattr(model, "text_model", model)  # the extra level went away in transformers 5
    inner.embeddings.position_ids = None  # `forward` passes positions; as a buffer it would not survive meta
    return inner
