"""AnimateDiff (Guo et al. 2023, arXiv 2307.04725) on plain PyTorch.

from animatediff import AnimateDiff, save_videos_grid

model = AnimateDiff.from_config("configs/animate/shapes.yaml")
clips = model.infer("a red circle moving left", num_inference_steps=25)["samples"]
save_videos_grid(clips, "clip.gif")
"""

from importlib import import_module

__version__ = "0.1.0"

# name -> module that has it; imported when first used, so that `import animatediff` costs nothing
_PUBLIC = {
    "AnimateDiff": "animatediff.pipelines.animate",
    "AnimateDiffOutput": "animatediff.pipelines.animate",
    "AnimateDiffPipeline": "animatediff.pipelines.animate",
    "FreeInit": "animatediff.steering",
    "FreeU": "animatediff.steering",
    "Travel": "animatediff.diffusion.prompt_travel",
    "UserError": "animatediff.utils",
    "Windows": "animatediff.diffusion.windows",
    "animate": "animatediff.pipelines.run",
    "load_config": "animatediff.config",
    "read_metadata": "animatediff.data.video_io",
    "read_video": "animatediff.data.video_io",
    "save_video": "animatediff.data.video_io",
    "save_videos_grid": "animatediff.data.video_io",
}
__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module 'animatediff' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
