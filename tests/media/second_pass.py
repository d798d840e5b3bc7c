"""What the second pass makes of three clips of the bundled model, beside the first pass enlarged by Lanczos.

`python -m tests.media.second_pass` prints the table of docs/finishing.md.
"""

from __future__ import annotations

import torch
from torch import Tensor

from animatediff.media.enlarge import enlarge
from animatediff.metrics.video_metrics import flicker
from animatediff.pipeline.outputs import as_bytes, decode_pixels
from animatediff.pipeline.pipeline import AnimateDiffPipeline
from tests.media.interpolation import psnr

CONFIG = "configs/animate/shapes.yaml"
PROMPTS = (
    "a large red circle moving left on a black background",
    "a small orange cross bouncing on a beige background",
    "a large blue star spinning clockwise on a white background",
)
WAYS = (("pixels", 0.3), ("latents", 0.15), ("latents", 0.3), ("latents", 0.5))
SCALE = 1.5


def sharpness(video: Tensor) -> float:
    """Root mean square of neighbouring pixels' differences, of both directions."""
    x = video.float()
    return float(x.diff(dim=-1).square().mean().sqrt() + x.diff(dim=-2).square().mean().sqrt())


def main() -> None:
    pipe = AnimateDiffPipeline.from_config(CONFIG, device="cpu")
    sums = {way: torch.zeros(3) for way in WAYS}
    for prompt in PROMPTS:
        request = pipe.request_for({"prompt": prompt, "steps": 20, "seed": 3})
        first = as_bytes(decode_pixels(pipe.vae, pipe.sample(request), chunk_frames=8))
        for way, total in sums.items():
            finish = {"scale": SCALE, "enlarge": way[0], "strength": way[1]}
            made = pipe.finish(first, pipe.request_for({"prompt": prompt, "steps": 20, "seed": 3, "finish": finish}))[0]
            plain = enlarge(first[0], *made.shape[-2:])
            numbers = (sharpness(made) / sharpness(plain), psnr(made, plain), flicker(made) / flicker(first[0]))
            total += torch.tensor(numbers) / len(PROMPTS)
    for (enlarged, strength), numbers in sums.items():
        print(f"| {enlarged}, strength {strength} | " + " | ".join(f"{n:.2f}" for n in numbers.tolist()) + " |")


if __name__ == "__main__":
    main()
