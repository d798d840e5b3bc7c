"""What a person looks at: aligned tables, CSV files, and contact sheets of clips."""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from animatediff.utils import printable, replacing

CAPTION_HEIGHT, MARGIN = 16, 4  # pixels of a contact sheet
RIGHT, WRONG, INK, PAPER = (20, 120, 40), (190, 20, 20), (20, 20, 20), (255, 255, 255)
Row = tuple[Sequence[tuple[str, tuple[int, int, int]]], np.ndarray]  # coloured words, uint8 frames (f, H, W, 3)


def align(lines: Sequence[Sequence[str]]) -> str:
    """Lines of cells as text: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) + 2 for column in zip(*lines, strict=True)]
    return "\n".join(
        first.ljust(widths[0]) + "".join(cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True))
        for first, *cells in lines
    )


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows with the keys of the first as the header; None is an empty cell.

    A text that a spreadsheet would run as a formula starts with an apostrophe.
    """
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8", errors="replace") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows({key: _inert(value) for key, value in row.items()} for row in rows)


def _inert(value: Any) -> Any:
    runs = isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r", "\n"))
    return f"'{value}" if runs and not re.fullmatch(r"-|-?[\d.]+( ± [\d.]+)?", value) else value


def one_line(text: str) -> str:
    """Without line ends and control characters."""
    return printable(text.replace("\n", " "))


def contact_sheet(rows: Sequence[Row]) -> Image.Image:
    """The frames of each clip side by side, under a line of words."""
    rows = [([(one_line(word), color) for word, color in words], frames) for words, frames in rows]
    strips = [np.concatenate(list(frames), axis=1) for _, frames in rows]
    draw, font = ImageDraw.Draw(Image.new("RGB", (1, 1))), ImageFont.load_default()
    lengths = [draw.textlength("   ".join(word for word, _ in words), font=font) for words, _ in rows]
    width = max(*(strip.shape[1] for strip in strips), *(round(length) for length in lengths))
    height = sum(CAPTION_HEIGHT + strip.shape[0] + MARGIN for strip in strips)
    sheet = Image.new("RGB", (width + 2 * MARGIN, height + MARGIN), PAPER)
    draw, top = ImageDraw.Draw(sheet), MARGIN
    for (words, _), strip in zip(rows, strips, strict=True):
        left = float(MARGIN)
        for word, color in words:
            draw.text((left, top), word, fill=color, font=font)
            left += draw.textlength(f"{word}   ", font=font)
        sheet.paste(Image.fromarray(strip), (MARGIN, top + CAPTION_HEIGHT))
        top += CAPTION_HEIGHT + strip.shape[0] + MARGIN
    return sheet
