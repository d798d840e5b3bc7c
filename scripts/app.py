"""A page for animating, in the browser.   `python scripts/app.py`   (needs: pip install -e ".[web]")"""

from __future__ import annotations

import argparse
from dataclasses import fields

from animatediff.utils import Parser, run_main

HELP = {
    "host": "address to listen at; one that others can reach, such as 0.0.0.0, needs --password",
    "port": "by default the first free one from 7860 on",
    "password": "asked of everybody, under any user name",
    "models": "folder of weight files, laid out as the README says",
    "output_dir": "folder of the clips",
    "max_upload_mb": "largest upload",
    "device": "auto, cuda, mps or cpu",
    "dtype": "float32, float16 or bfloat16; by default float16 on CUDA, else float32",
}
KINDS = {"port": int, "max_upload_mb": float}


def main(argv: list[str] | None = None) -> None:
    from animatediff.page.serve import ServerOptions, serve  # here, because it imports torch

    parser = Parser(description=__doc__, allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    for field in fields(ServerOptions):
        flag = "--" + field.name.replace("_", "-")
        parser.add_argument(flag, default=field.default, type=KINDS.get(field.name, str), help=HELP[field.name])
    serve(ServerOptions(**vars(parser.parse_args(argv))))


if __name__ == "__main__":
    run_main(main)
