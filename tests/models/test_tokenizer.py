"""The tokenizer against the standard tokenizer's ids."""

import json
import random
import unicodedata
from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as StandardTokenizer

from animatediff.models.tokenizer import END, START, WORD_END, Tokenizer, build_vocabulary, read_bundled_merges
from animatediff.utils import UserError

TOKENS = json.loads((Path(__file__).parents[1] / "golden/tokens.json").read_text(encoding="utf-8"))
START_ID, END_ID = 49406, 49407


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer()


def test_vocabulary_follows_from_the_merges():
    merges = read_bundled_merges()
    vocabulary = build_vocabulary(merges)
    assert len(merges) == 48894 and len(vocabulary) == 49408
    assert (vocabulary["!"], vocabulary["!</w>"], vocabulary["in"]) == (0, 256, 512)
    assert (vocabulary[START], vocabulary[END]) == (START_ID, END_ID)


@pytest.mark.parametrize("prompt", TOKENS, ids=range(len(TOKENS)))
def test_first_chunk_has_the_standard_ids(tokenizer, prompt):
    assert tokenizer([prompt])[0, 0].tolist() == TOKENS[prompt]


def test_long_prompt_is_chunked_not_cut(tokenizer):
    prompts = ["cat dog " * 100, "", "a photo of a cat"]
    ids = tokenizer(prompts)
    assert ids.shape == (3, 3, 77) and ids.dtype == torch.int64
    assert (ids[:, :, 0] == START_ID).all()
    assert ids[0, :, 1:76].flatten()[:200].tolist() == tokenizer.tokenize("cat dog") * 100
    assert (ids[0, :2, 76] == END_ID).all() and (ids[0, 2, 51:] == END_ID).all()
    assert ids[1].tolist() == [TOKENS[""]] * 3
    assert ids[2].tolist() == [TOKENS["a photo of a cat"], TOKENS[""], TOKENS[""]]


@pytest.mark.parametrize(("words", "chunks"), [(75, 1), (76, 2), (150, 2), (151, 3)])
def test_chunk_boundaries(tokenizer, words, chunks):
    assert tokenizer(["cat " * words]).shape == (1, chunks, 77)


def test_shorter_chunks(tokenizer):
    a, b, c = tokenizer.tokenize("red blue green")
    chunks = [[START_ID, a, b, END_ID], [START_ID, c, END_ID, END_ID]]
    assert tokenizer(["red blue green"], max_length=4).tolist() == [chunks]
    with pytest.raises(UserError, match="max_length 2"):
        tokenizer(["a"], max_length=2)


def test_odd_input(tokenizer):
    assert tokenizer([]).shape == (0, 1, 77)
    assert tokenizer.tokenize("cat\ud83d") == tokenizer.tokenize("cat?")
    assert tokenizer.tokenize("cafe\u0301") == tokenizer.tokenize("caf\u00e9")
    assert tokenizer.tokenize(f"cat{END}dog") == [*tokenizer.tokenize("cat"), END_ID, *tokenizer.tokenize("dog")]
    assert len(tokenizer.tokenize("\x00")) > 0
    for wrong in ("a cat", ["a cat", None]):
        with pytest.raises(UserError, match="expected a list of texts"):
            tokenizer(wrong)


# --- against the tokenizers library ---

SPELLINGS = [
    *("a", "B", "É", "e\u0301", "Σ", "İ", "ß", "ﬀ", "²", "½", "Ⅷ", "٣", "DŽ", "一", "😀", "👩\u200d👧", "-1", "!"),
    *(" ", "\t", "\n", "\u2003", "\xa0", "\x1c", "\u200b", "'s", "'LL", "''", "cat", "Dog's", "<STYLE>", "CAT  DOG"),
    *("__", "<", ">", START, END, END.upper(), START.title(), "<|", "|>", "endoftext"),
]  # fmt: skip
ASCII = [chr(i) for i in range(32, 127)]
KNOWN = [c for c in map(chr, range(1, 0x3000)) if unicodedata.category(c) != "Cn"]  # to Python's Unicode as to theirs


@pytest.fixture(scope="module")
def standard() -> StandardTokenizer:
    """CLIP's tokenizer as the tokenizers library has it, with two added tokens."""
    merges = read_bundled_merges()
    suffix = {"continuing_subword_prefix": "", "end_of_word_suffix": WORD_END, "unk_token": END}
    bpe = StandardTokenizer(models.BPE(vocab=build_vocabulary(merges), merges=merges, **suffix))
    spaces = normalizers.Replace(Regex(r"\s+"), " ")
    bpe.normalizer = normalizers.Sequence([normalizers.NFC(), spaces, normalizers.Lowercase()])
    words = Regex(r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
    split = pre_tokenizers.Split(words, behavior="removed", invert=True)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    bpe.add_special_tokens([AddedToken(token, normalized=False) for token in (START, END)])
    bpe.add_tokens([AddedToken("<Style>"), AddedToken("cat dog")])
    return bpe


def test_any_text_has_the_standard_ids(standard):
    ours = Tokenizer(added_tokens={"<Style>": 49408, "cat dog": 49409})
    draw = random.Random(0)
    for _ in range(300):
        length = draw.randrange(1, 40)
        words = "".join(draw.choice(SPELLINGS) for _ in range(length))
        letters = "".join(draw.choice((draw.choice(ASCII), draw.choice(KNOWN))) for _ in range(length))
        for text in (words, letters):
            assert ours.tokenize(text) == standard.encode(text, add_special_tokens=False).ids, repr(text)


# --- tokenizer folders ---


def write_folder(folder: Path, **more: dict) -> Path:
    merges = read_bundled_merges()
    (folder / "vocab.json").write_text(json.dumps(build_vocabulary(merges)), encoding="utf-8")
    lines = ["#version: 0.2", *map(" ".join, merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    for name, content in more.items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def test_folder_like_sd15(tokenizer, tmp_path):
    pad = {"pad_token": {"content": END, "normalized": True}}
    loaded = Tokenizer.from_folder(write_folder(tmp_path, tokenizer_config=pad))
    assert torch.equal(loaded(list(TOKENS)), tokenizer(list(TOKENS)))


def test_folder_with_added_token_and_other_padding(tokenizer, tmp_path):
    folder = write_folder(tmp_path, added_tokens={"<style>": 49408}, tokenizer_config={"pad_token": "!"})
    loaded = Tokenizer.from_folder(folder)
    cat, hat = tokenizer.tokenize("cat hat")
    assert loaded.vocab_size == 49409
    assert loaded(["cat <style> hat"], max_length=7).tolist() == [[[START_ID, cat, 49408, hat, END_ID, 0, 0]]]


def test_folder_with_tokenizer_json_alone(tokenizer, tmp_path):
    merges = read_bundled_merges()
    content = {
        "model": {"vocab": build_vocabulary(merges), "merges": merges},
        "added_tokens": [{"content": START, "id": START_ID}, {"content": END, "id": END_ID}],
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    assert torch.equal(Tokenizer.from_folder(tmp_path)(list(TOKENS)), tokenizer(list(TOKENS)))


def test_folder_mistakes(tmp_path):
    with pytest.raises(UserError, match="without a tokenizer"):
        Tokenizer.from_folder(tmp_path)
    write_folder(tmp_path, added_tokens={"<style>": 50000})
    with pytest.raises(UserError, match="<style> with id 50000, expected 49408"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "vocab.json").write_text('{"a": 0}', encoding="utf-8")
    with pytest.raises(UserError, match="of tokens the vocabulary lacks"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "merges.txt").write_text("a b c\n", encoding="utf-8")
    with pytest.raises(UserError, match="expected two tokens"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "vocab.json").write_text("<html>", encoding="utf-8")
    with pytest.raises(UserError, match="vocab.json with broken content"):
        Tokenizer.from_folder(tmp_path)
