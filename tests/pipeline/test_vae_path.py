"""`vae_path`: it decodes in place of the image model's VAE, whoever that comes from, and the latents do not change."""

from pathlib import Path

import pytest
import torch

from animatediff.checkpoints.export import save_vae
from animatediff.checkpoints.files import file_sha256
from animatediff.checkpoints.keymaps import LDM_VAE
from animatediff.checkpoints.load import load_base, load_vae
from animatediff.config.networks import VAEConfig
from animatediff.config.prompt_yaml import load_config
from animatediff.media.video import read_metadata
from animatediff.models.vae import VAE
from animatediff.pipeline.assemble import Assembler
from animatediff.pipeline.headers import check_requests
from animatediff.pipeline.pipeline import AnimateDiffPipeline
from animatediff.pipeline.run import animate
from animatediff.utils import UserError
from animatediff.world.series import World
from animatediff.world.styles import STYLES
from tests.checkpoints.synthetic import METADATA, ldm_tensors, write
from tests.nano import entry, flat, write_config

ASSETS = Path(__file__).parents[2] / "animatediff/assets"


@pytest.fixture(scope="module")
def other(nano):
    """Another VAE for the same latents, and of other sizes."""
    torch.manual_seed(0)
    return save_vae(VAE(VAEConfig(block_out_channels=(8, 8, 16, 16), norm_num_groups=4)), nano / "vae.safetensors")


def test_frames_change_and_latents_do_not(nano, pipeline, other):
    changed = AnimateDiffPipeline.from_config(nano / "run.yaml", vae_path=str(other), device="cpu")
    sizes = {"num_frames": 2, "height": 16, "width": 16, "num_inference_steps": 2}
    for kind, same in (("latent", True), ("pt", False)):
        a, b = (
            pipe("a red fox", **sizes, output_type=kind, generator=torch.Generator().manual_seed(1)).frames
            for pipe in (pipeline, changed)
        )
        assert torch.equal(a, b) == same, kind


@pytest.mark.slow
def test_it_goes_before_the_personalised_and_the_base_model(nano, make_entry, other):
    """And is gone in the next entry; the image models themselves are not read again."""
    tensors = {key: t * 1.5 for key, t in ldm_tensors().items()}
    personal = {"dreambooth_path": str(write(nano / "own.safetensors", tensors, **METADATA))}
    vae = {"vae_path": str(other)}
    assembler = Assembler(torch.device("cpu"), torch.float32)
    base, own, over_base, over_own, again = (
        assembler.assemble(checked)
        for checked in check_requests(make_entry(**values) for values in ({}, personal, vae, personal | vae, personal))
    )
    first = "encoder.conv_in.weight"
    kernels = [c.vae.get_parameter(first) for c in (base, own, over_base, over_own, again)]
    assert torch.equal(kernels[2], kernels[3]) and kernels[2].shape != kernels[0].shape
    assert not torch.equal(kernels[0], kernels[1]) and torch.equal(kernels[1], kernels[4])
    weight = "conv_in.weight"
    assert own.unet.get_parameter(weight).data_ptr() == over_own.unet.get_parameter(weight).data_ptr()
    assert str(other) in over_own.reports[1] and not any(str(other) in line for line in again.reports)


def test_a_base_without_a_vae_takes_it(nano, make_entry, other):
    tensors = {key: t for key, t in ldm_tensors().items() if not key.startswith(LDM_VAE)}
    values = {"pretrained_model_path": str(write(nano / "bare.safetensors", tensors, **METADATA))}
    assembler = Assembler(torch.device("cpu"), torch.float32)
    with pytest.raises(UserError, match="without a VAE, .* or a VAE by vae_path"):
        assembler.assemble(check_requests([make_entry(**values)])[0])
    components = assembler.assemble(check_requests([make_entry(**values, vae_path=str(other))])[0])
    assert components.vae.config.block_out_channels == (8, 8, 16, 16)


def test_a_run_records_it(nano, other, tmp_path):
    values = entry(nano, vae_path=str(other), motion_module="", format="png")
    folder = animate(load_config(write_config(tmp_path / "x.yaml", values)), output_dir=tmp_path / "out", device="cpu")
    (clip,) = (folder / "sample").iterdir()
    assert flat(read_metadata(clip))["vae_path"] == {"path": str(other), "sha256": file_sha256(other)}
    saved = load_config(folder / "config.yaml")
    assert saved.entries[0].model.vae == str(other) and saved.provenance["weights"][str(other)] == file_sha256(other)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("{nano}/kohya.safetensors", "entry 1: vae_path: .*kohya.safetensors: this is a LoRA .*, not a VAE: use it as"),
        ("models/vae-ft-mse-840000-ema-pruned.ckpt", "vae_path: there is no .*stabilityai/sd-vae-ft-mse-original"),
    ],
)
def test_mistakes_are_named_before_anything_is_loaded(nano, make_entry, path, message):
    with pytest.raises(UserError, match=message) as error:
        check_requests([make_entry(name="1", vae_path=path.format(nano=nano))])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("style", ["neon", *(pytest.param(s, marks=pytest.mark.slow) for s in STYLES if s != "neon")])
def test_the_bundled_vae_draws_every_look(style):
    """Plain pictures less exactly than the image model's, which knows no others and draws them in wrong colours."""
    image = load_base(ASSETS / "shapes.safetensors")
    video, _ = World(6, style=style, seed=1).render(range(6))

    def decibels(vae) -> float:
        with torch.no_grad():
            drawn = vae.decode_video(vae.encode_video(video)).clamp(-1, 1)
        return float(10 * torch.log10(4 / (drawn - video).square().mean()))

    bundled, own = decibels(load_vae(ASSETS / "shapes_vae.safetensors", image)[0]), decibels(image.vae)
    assert bundled > 29
    assert bundled > own + (-3 if style == "plain" else 8)
