"""Installs two import packages: `animatediff` and, from kernels/, `animatediff_kernels`."""

from setuptools import find_packages, setup

setup(
    name="animatediff",
    version="0.1.0",
    description="AnimateDiff (arXiv 2307.04725) on plain PyTorch: animate any SD 1.5 model, train every stage",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["animatediff*"]) + find_packages("kernels"),
    package_dir={"animatediff_kernels": "kernels/animatediff_kernels"},
    package_data={"animatediff": ["assets/*", "page/*.css"], "animatediff_kernels": ["measured.csv"]},
    install_requires=[
        "torch>=2.6,<2.14",
        'triton; platform_system == "Linux"',
        "numpy",
        "einops",
        "transformers>=4.40",
        "safetensors",
        "omegaconf",
        "pydantic>=2.7",
        "imageio[pyav]>=2.35",
        "av>=17",
        "pillow>=10.1",
        "tqdm",
    ],
    extras_require={
        "dev": ["pytest", "pytest-xdist", "ruff"],
        "tensorboard": ["tensorboard"],
        "bench": ["matplotlib"],
        "finish": ["spandrel"],
        "hints": ["opencv-python-headless"],
        "web": ["gradio>=6.31,<7"],
    },
)
