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
    "AnimateDiff": "animatediff.pipeline.pipeline",
    "AnimateDiffOutput": "animatediff.pipeline.call",
    "AnimateDiffPipeline": "animatediff.pipeline.pipeline",
    "FreeInit": "animatediff.config.request",
    "FreeU": "animatediff.config.request",
    "Request": "animatediff.config.request",
    "Travel": "animatediff.config.request",
    "UserError": "animatediff.utils",
    "Windows": "animatediff.config.request",
    "animate": "animatediff.pipeline.run",
    "load_config": "animatediff.config.prompt_yaml",
    "read_metadata": "animatediff.media.video",
    "read_video": "animatediff.media.video",
    "save_video": "animatediff.media.video",
    "save_videos_grid": "animatediff.media.video",
}
__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module 'animatediff' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
