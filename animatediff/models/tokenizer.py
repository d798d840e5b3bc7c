"""Prompts to token ids: the byte-pair tokenizer of CLIP (Radford et al. 2021, arXiv 2103.00020), offline."""

from __future__ import annotations

import functools
import gzip
import json
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from animatediff.models.prompt_weighting import Section
from animatediff.utils import UserError, naming

START, END = "<|startoftext|>", "<|endoftext|>"
WORD_END = "</w>"
SPACES = "\t\n\v\f\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"  # Unicode's White_Space
# Of a text: English contractions, and the parts of a special token, which is one no more once its capitals are small.
FIXED_WORDS = re.compile(r"('s|'t|'re|'ve|'m|'ll|'d)|(<\|)(startoftext|endoftext)(\|>)")
# Of the kinds of its characters: runs of letters, single digits, runs of anything else that is not blank.
WORD = re.compile("L+|N|[^LNZ]+")

Merge = tuple[str, str]


@functools.cache
def read_bundled_merges() -> list[Merge]:
    """The 48,894 merges of OpenAI's CLIP, in order of priority; read once, so not to be changed."""
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


def spell_bytes() -> list[str]:
    """The 256 bytes as printable characters: Latin-1 ones stand for themselves, the others are 256 and up."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


BYTES = spell_bytes()


def build_vocabulary(merges: list[Merge]) -> dict[str, int]:
    """Token -> id: 256 bytes, the same at a word's end, one token per merge, start and end (49,408 for CLIP)."""
    alphabet = sorted(BYTES)
    tokens = alphabet + [c + WORD_END for c in alphabet] + [left + right for left, right in merges] + [START, END]
    return {token: i for i, token in enumerate(tokens)}


class Tokenizer:
    """CLIP's byte-pair tokenizer; without arguments, OpenAI's table from `animatediff/assets`.

    Args:
        merges: pairs to join, in order of priority.
        vocabulary: token -> id; derived from the merges where not given.
        added_tokens: whole words -> ids that continue the vocabulary, kept in one piece wherever they occur.
        pad_token: fills a chunk after its end token (`<|endoftext|>` for every SD 1.x model).

    Attributes:
        own_words: those of `add_word` -> their ids.

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
        if merges is None and vocabulary is None:
            vocabulary, self._ranks = _bundled_tables()
        else:
            merges = read_bundled_merges() if merges is None else merges
            vocabulary, self._ranks = _tables(merges, vocabulary)
        self._vocabulary = vocabulary | _continued(vocabulary, added_tokens or {})
        self._special = _one_of(token for token in (START, END) if token in self._vocabulary)
        self._added = {_normalized(token): token for token in added_tokens or {} if token not in (START, END)}
        self._is_added = _one_of(self._added)
        self._cache: dict[str, list[int]] = {}  # word -> ids
        self.vocab_size = len(self._vocabulary)
        self.start_id, self.end_id, self.pad_id = (self._special_id(token) for token in (START, END, pad_token))
        self.own_words: dict[str, list[int]] = {}

    @classmethod
    def from_folder(cls, folder: str | Path) -> Tokenizer:
        """Read a `tokenizer/` folder of a diffusers model (vocab.json + merges.txt, or tokenizer.json alone).

        Raises:
            UserError: the folder holds neither, or its files do not belong together.
        """
        folder = Path(folder)
        added = _token_ids(_read_json(folder / "added_tokens.json"), folder / "added_tokens.json")
        if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
            vocabulary = _token_ids(_read_json(folder / "vocab.json"), folder / "vocab.json")
            merges = parse_merges(_read_text(folder / "merges.txt").splitlines())
        elif (folder / "tokenizer.json").is_file():
            vocabulary, merges, more = _read_fast_tokenizer(folder / "tokenizer.json")
            added |= more
        else:
            raise UserError(
                f"got {folder} without a tokenizer, expected vocab.json and merges.txt (or tokenizer.json) in it: "
                "restore them, or remove the folder to use the bundled CLIP table"
            )
        pad = _read_json(folder / "tokenizer_config.json").get("pad_token") or END
        pad = pad.get("content") if isinstance(pad, dict) else pad
        if not isinstance(pad, str):
            raise UserError(f"got pad_token {pad!r} in {folder / 'tokenizer_config.json'}, expected a token")
        with naming(folder):
            return cls(merges, vocabulary, added_tokens=added, pad_token=pad)

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
        if not key or key in self.own_words:
            what = f"the word {word!r} twice" if key else "a blank word"
            raise UserError(f"got {what}, expected one of its own: give it a name")
        self.own_words[key] = ids

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
                yield self.own_words[part]
            else:
                yield from ([token] for token in self._encode(part))

    def _split(self, text: str) -> list[str]:
        """What is between added words, and after each of these but the last the word that follows."""
        if not self.own_words:
            return [text]
        longest_first = sorted(self.own_words, key=len, reverse=True)
        return re.split(f"({'|'.join(map(_whole_word, longest_first))})", text.lower())

    def _special_id(self, token: str) -> int:
        if token not in self._vocabulary:
            raise UserError(f"got a vocabulary without {token}, expected CLIP's: check the model's tokenizer folder")
        return self._vocabulary[token]

    def _encode(self, text: str) -> Iterator[int]:
        """Special tokens are found in the text as it is written, added ones in the normalized text."""
        clean = text.encode("utf-8", errors="replace").decode("utf-8")  # half a surrogate pair is no text
        for i, part in enumerate(self._special.split(clean)):
            if i % 2:
                yield self._vocabulary[part]
                continue
            for j, rest in enumerate(self._is_added.split(_normalized(part))):
                if j % 2:
                    yield self._vocabulary[self._added[rest]]
                    continue
                for word in _words(rest):
                    if word not in self._cache:
                        self._cache[word] = self._merge(word)
                    yield from self._cache[word]

    def _merge(self, word: str) -> list[int]:
        """The ids of a word's bytes after joining neighbours, always the pair that has priority."""
        parts = [BYTES[byte] for byte in word.encode("utf-8")]
        parts[-1] += WORD_END
        while known := self._ranks.keys() & zip(parts, parts[1:], strict=False):
            pair = min(known, key=self._ranks.__getitem__)
            joined: list[str] = []
            rest = iter(range(len(parts)))
            for i in rest:
                found = tuple(parts[i : i + 2]) == pair
                joined.append("".join(pair) if found else parts[i])
                if found:
                    next(rest)
            parts = joined
        return [self._vocabulary.get(part, self.end_id) for part in parts]


@functools.cache
def _bundled_tables() -> tuple[dict[str, int], dict[Merge, int]]:
    """`_tables` of OpenAI's merges: made once, for all tokenizers, so not to be changed."""
    return _tables(read_bundled_merges(), None)


def _tables(merges: list[Merge], vocabulary: dict[str, int] | None) -> tuple[dict[str, int], dict[Merge, int]]:
    """The vocabulary, derived from the merges where not given, and each merge's rank."""
    vocabulary = build_vocabulary(merges) if vocabulary is None else vocabulary
    _check_merges(merges, vocabulary)
    return vocabulary, {merge: rank for rank, merge in enumerate(merges)}


def _check_merges(merges: list[Merge], vocabulary: dict[str, int]) -> None:
    for left, right in merges:
        if not (left + right in vocabulary and left in vocabulary and right in vocabulary):
            raise UserError(
                f"got the merge {f'{left} {right}'[:80]!r} of tokens the vocabulary lacks, expected a vocabulary with "
                "all of them: take merges and vocabulary from the same model"
            )


def _continued(vocabulary: dict[str, int], added: dict[str, int]) -> dict[str, int]:
    """Added tokens, checked: each is known by that id, or has the next one that is free."""
    free = len(vocabulary)
    for token, index in sorted(added.items(), key=lambda item: item[1]):
        expected = vocabulary.get(token, free)
        if index != expected:
            raise UserError(
                f"got added token {token} with id {index}, expected {expected}: ids must continue the vocabulary"
            )
        free += token not in vocabulary
    return added


def _one_of(words: Iterable[str]) -> re.Pattern[str]:
    """Finds the longest of some words; nothing where there are none."""
    return re.compile(f"({'|'.join(re.escape(word) for word in sorted(words, key=len, reverse=True)) or '(?!)'})")


def _normalized(text: str) -> str:
    """Composed, in small letters, one by one (a final sigma is one like any), blanks as single spaces."""
    spaced = re.sub(f"[{SPACES}]+", " ", unicodedata.normalize("NFC", text))
    return "".join(character.lower() for character in spaced)


def _words(text: str) -> Iterator[str]:
    """What CLIP takes for words; blanks are dropped."""
    kinds = "".join(_kind(character) for character in text)
    at = 0
    while at < len(text):
        if match := FIXED_WORDS.match(text, at):
            yield from filter(None, match.groups())
        elif match := WORD.match(kinds, at):
            yield text[at : match.end()]
        at = match.end() if match else at + 1


def _kind(character: str) -> str:
    """L letter, N number, Z blank, or another letter."""
    return "Z" if character == " " else unicodedata.category(character)[0].replace("Z", "-")


def _whole_word(word: str) -> str:
    """The pattern of a word that no letter or digit continues."""
    before, after = (r"\b" if re.match(r"\w", end) else "" for end in (word[0], word[-1]))
    return before + re.escape(word) + after


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"got {path} with broken content ({error}), expected UTF-8: fetch the file again") from None


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object, empty where there is no such file."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(_read_text(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"got {path} with broken content ({error}), expected JSON: fetch the file again") from None
    if not isinstance(content, dict):
        raise UserError(f"got {path} holding a {type(content).__name__}, expected an object: fetch the file again")
    return content


def _token_ids(content: Any, path: Path) -> dict[str, int]:
    """Token -> id, as a file says it."""
    if not isinstance(content, dict) or not all(type(i) is int and 0 <= i < 10_000_000 for i in content.values()):
        raise UserError(f"got {path} with ids that are no whole numbers, expected a token's id each: fetch it again")
    return content


def _read_fast_tokenizer(path: Path) -> tuple[dict[str, int], list[Merge], dict[str, int]]:
    """Vocabulary, merges and added tokens of a tokenizer.json."""
    saved = _read_json(path)
    model, extra = saved.get("model"), saved.get("added_tokens") or []
    pairs = model.get("merges") if isinstance(model, dict) else None
    if not isinstance(pairs, list) or not isinstance(extra, list) or not all(isinstance(row, dict) for row in extra):
        raise UserError(f"got {path}, expected a model with vocab and merges, and added_tokens: fetch it again")
    merges = [tuple(pair.split(" ")) if isinstance(pair, str) else pair for pair in pairs]
    for pair in merges:
        if not isinstance(pair, list | tuple) or len(pair) != 2 or not all(isinstance(token, str) for token in pair):
            raise UserError(f"got the merge {str(pair)[:80]!r} in {path}, expected two tokens: fetch it again")
    added = {str(row.get("content")): row.get("id") for row in extra}
    return _token_ids(model.get("vocab"), path), [(a, b) for a, b in merges], _token_ids(added, path)
