"""docs/architecture.md, "How to add a feature", word for word, in a copy of the package."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from tests.nano import entry, write_config

ROOT = Path(__file__).parents[2]
PROGRAM = """
import sys
import torch
from animatediff import AnimateDiff
from animatediff.features.noise import seeded
from animatediff.utils import UserError

pipe = AnimateDiff.from_config(sys.argv[1], device="cpu")

def run(**options):
    return pipe("a fox", num_frames=3, num_inference_steps=2, generator=seeded(1), noise_type="constant",
                output_type="latent", **options).frames

plain, quarter, half, one = run(unify_share=0), run(), run(unify={"share": 0.5}), run(unify_share=1.0)
assert torch.allclose(one, one[:, :, :1].expand_as(one), atol=1e-4)
spread = [float(clip.std(dim=2).mean()) for clip in (one, half, quarter, plain)]
assert spread == sorted(spread), spread

try:
    AnimateDiff.from_config(sys.argv[2], device="cpu")
except UserError as error:
    print(error)
"""


def test_the_example_works(nano, tmp_path):
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    section = text.split("### How to add a feature")[1].split("\n## ")[0]
    options, group, feature, word = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    package = tmp_path / "animatediff"
    shutil.copytree(ROOT / "animatediff", package, ignore=shutil.ignore_patterns("__pycache__", "*.safetensors"))

    request = (package / "config/request.py").read_text(encoding="utf-8")
    request = request.replace("@options\nclass Output", f"{options}\n\n@options\nclass Output")
    request = request.replace("    output: Output = Output()", f"{group}    output: Output = Output()")
    (package / "config/request.py").write_text(request, encoding="utf-8")
    (package / "features/unify.py").write_text(feature, encoding="utf-8")
    registry = (package / "features/registry.py").read_text(encoding="utf-8")
    (package / "features/registry.py").write_text(registry + "\n" + word, encoding="utf-8")

    config = write_config(tmp_path / "fox.yaml", entry(nano, unify_share=0.25))
    wrong = write_config(tmp_path / "wrong.yaml", entry(nano, unify_share=2))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT / "kernels")])}
    program = [sys.executable, "-c", PROGRAM, str(config), str(wrong)]
    done = subprocess.run(program, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "unify_share: got 2, expected at most 1" in done.stdout
