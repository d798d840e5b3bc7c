"""Weights of the words in a prompt, written as in AUTOMATIC1111's web UI, and what they do to an embedding.

(word)      1.1 times as much          [word]    1 / 1.1 times
(word:1.3)  1.3 times                  ((word))  1.21 times: brackets multiply
\\( \\) \\[ \\]  brackets that are meant   BREAK     what follows begins a new chunk of tokens
"""

from __future__ import annotations

import re

import torch
from torch import Tensor

Section = list[tuple[str, float]]  # texts and their weights, in order

BRACKET = 1.1
FACTORS = {"(": BRACKET, "[": 1 / BRACKET}
CLOSING = {")": "(", "]": "["}
TOKEN = re.compile(r"\\([()\[\]\\])|:\s*([+-]?(?:\d+\.?\d*|\.\d+))\s*\)|[()\[\]]|[^\\()\[\]:]+|.", re.DOTALL)
BREAK = re.compile(r"\s*\bBREAK\b\s*")


def parse_prompt(prompt: str) -> list[Section]:
    """A prompt as sections between its BREAKs, each of weighted texts; neighbours of one weight are one text.

    Nothing is wrong: a bracket that is never closed counts up to the end of the prompt, one that was never opened is
    text, and so is a number that no round bracket was opened for.
    """
    pieces: Section = []
    opened: dict[str, list[int]] = {"(": [], "[": []}  # how many pieces came before each bracket that is open
    for match in TOKEN.finditer(prompt):
        token, escaped, number = match[0], match[1], match[2]
        bracket = "(" if number else CLOSING.get(token, "")
        if token in opened:
            opened[token].append(len(pieces))
        elif opened.get(bracket):
            _weigh(pieces, opened[bracket].pop(), float(number) if number else FACTORS[bracket])
        else:
            pieces.append((escaped or token, 1.0))
    for bracket, starts in opened.items():
        for start in starts:
            _weigh(pieces, start, FACTORS[bracket])
    return _sections(pieces)


def _weigh(pieces: Section, start: int, factor: float) -> None:
    pieces[start:] = [(text, weight * factor) for text, weight in pieces[start:]]


def _sections(pieces: Section) -> list[Section]:
    sections: list[Section] = [[]]
    for text, weight in pieces:
        for i, part in enumerate(BREAK.split(text)):
            if i:
                sections.append([])
            section = sections[-1]
            if section and section[-1][1] == weight:
                section[-1] = (section[-1][0] + part, weight)
            elif part:
                section.append((part, weight))
    return [section for section in sections if section] or [[("", 1.0)]]


def weigh_states(states: Tensor, weights: Tensor) -> Tensor:
    """The embedding's tokens times their weights, and the whole of each row scaled so that its mean stays.

    The mean is taken over one chunk of one prompt, so that neither the other prompts of a batch nor other chunks
    matter. Rows without weights stay as they are, bit for bit.

    Args:
        states: of the text encoder (n, l, d), one chunk per row.
        weights: (n, l), 1 for start, end and padding tokens.
    """
    plain = (weights == 1).all(dim=1)[:, None, None]
    weighted = states.float() * weights[..., None]
    mean = weighted.mean(dim=(1, 2), keepdim=True)
    scaled = weighted * (states.float().mean(dim=(1, 2), keepdim=True) / mean)
    return torch.where(plain, states, scaled.to(states))
