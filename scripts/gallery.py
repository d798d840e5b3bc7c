"""One page of what was made.   `python scripts/gallery.py samples/`

Writes `index.html` into the folder: every clip under it plays there, with its prompt, models, seed and all of its
settings. The page works from the disk, and asks nothing of any network.
"""

from __future__ import annotations

import argparse
import sys

from animatediff.utils import Parser, printable, run_main


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", default="samples", help="with clips, however deep (default: samples)")
    parser.add_argument("--output", help="the page (default: index.html in the folder)")
    args = parser.parse_args(argv)
    from animatediff.pipeline.gallery import write_gallery  # here: it imports torch

    output, clips, problems = write_gallery(args.folder, args.output)
    for line in problems:
        print(printable(f"left out: {line}"), file=sys.stderr)
    print(printable(f"{output}: {clips} clip{'s' * (clips != 1)}"))


if __name__ == "__main__":
    run_main(main)
