"""The bundled LoRA makes a clip in four steps, two of them guided, whose shapes these steps alone do not get right."""

from pathlib import Path

from animatediff.features.noise import seeded
from animatediff.pipeline.pipeline import AnimateDiffPipeline
from animatediff.world.read import Score, score_clip

CONFIG = Path(__file__).parents[2] / "configs/animate/shapes-four-steps.yaml"


def test_a_clip_in_four_steps():
    pipe, calls = AnimateDiffPipeline.from_config(CONFIG, device="cpu"), []
    pipe.unet.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    (name,) = pipe.model.loras.names

    def score() -> Score:
        call = {"num_inference_steps": 4, "guidance_scale": 2.0, "generator": seeded(87), "output_type": "pt"}
        return score_clip(pipe("orange star, expanding, white background", **call).frames[0] * 2 - 1)

    found = score()
    assert calls == [2, 2, 1, 1]
    assert (found.color, found.shape, found.background, found.motion) == ("orange", "star", "white", "grow")
    pipe.model.loras.set_scale(name, 0)
    assert score().shape == "circle"
