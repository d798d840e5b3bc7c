"""The architecture's rules that a machine can check: layers, and which file may import which library."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = {
    "animatediff_kernels": 0,
    "animatediff.utils": 1,
    "animatediff.config": 1,
    "animatediff.models": 2,
    "animatediff.diffusion": 2,
    "animatediff.media": 2,
    "animatediff.checkpoints": 3,
    "animatediff.features": 4,
    "animatediff.metrics": 4,
    "animatediff.pipeline": 5,
    "animatediff.world": 5,
    "animatediff.page": 6,
    "animatediff.training": 6,
    "animatediff.lab": 7,
}
IMPORT_RULES = {  # third-party package -> the only places that may import it
    "omegaconf": ("animatediff/config/settings.py", "tests/"),
    "pydantic": ("animatediff/config/settings.py", "tests/"),
    "yaml": ("animatediff/config/", "tests/"),
    "transformers": ("animatediff/checkpoints/image_encoder_files.py", "animatediff/metrics/", "tests/"),
    "tokenizers": ("tests/",),
    "safetensors": ("animatediff/checkpoints/files.py", "tests/"),
    "imageio": ("animatediff/media/",),
    "imageio_ffmpeg": (),
    "av": ("animatediff/media/seek.py", "animatediff/media/mp4.py", "animatediff/media/sound.py", "tests/media/"),
    "PIL": (
        "animatediff/media/",
        "animatediff/features/",
        "animatediff/pipeline/",
        "animatediff/metrics/",
        "animatediff/checkpoints/image_encoder_files.py",
        "animatediff/training/data/images.py",
        "scripts/show_windows.py",
        "tests/",
    ),
    "cv2": ("animatediff/media/preprocess.py",),
    "triton": ("kernels/",),
    "gradio": ("animatediff/page/", "tests/page/"),
    "starlette": ("animatediff/page/serve.py",),
    "selenium": ("tests/page/",),
    "diffusers": ("kernels/benchmarks/",),
    "matplotlib": ("kernels/benchmarks/",),
    "spandrel": ("animatediff/media/enlarge.py", "tests/media/"),
    "torchvision": (),
    "xformers": (),
}
FILES = [p for top in ("animatediff", "kernels", "scripts", "tests") for p in sorted((ROOT / top).rglob("*.py"))]


def imports(path: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.append(node.module)
    return found


def package(module: str) -> str | None:
    return next((p for p in LAYERS if module == p or module.startswith(p + ".")), None)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports(path):
    name = str(path.relative_to(ROOT)).removeprefix("kernels/").removesuffix(".py").replace("/", ".")
    own = package(name)
    for module in imports(path):
        top = module.split(".")[0]
        allowed = IMPORT_RULES.get(top)
        assert allowed is None or str(path.relative_to(ROOT)).startswith(allowed), f"{path} may not import {top}"
        other = package(module)
        if own and other and own != other:
            assert LAYERS[other] <= LAYERS[own], f"{own} may not import {other}, which is a higher layer"
            assert {own, other} != {"animatediff.models", "animatediff.diffusion"}, f"{own} may not know {other}"


def test_no_two_files_of_one_name():
    names = [path.name for path in (ROOT / "animatediff").rglob("*.py") if path.name != "__init__.py"]
    assert sorted(names) == sorted(set(names))
