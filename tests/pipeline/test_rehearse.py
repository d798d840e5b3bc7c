"""Loading is rehearsed without contents: what does not fit is told before a weight is read, whatever entry has it."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from animatediff.checkpoints.export import save_vae
from animatediff.checkpoints.files import read_state_dict, without_contents
from animatediff.checkpoints.mapped import converted
from animatediff.config.networks import VAEConfig
from animatediff.config.prompt_yaml import load_config
from animatediff.models.vae import VAE
from animatediff.pipeline.assemble import Assembler
from animatediff.pipeline.headers import check_requests
from animatediff.pipeline.rehearse import rehearse
from animatediff.utils import UserError
from scripts.animate import main
from tests.checkpoints.synthetic import METADATA, ldm_tensors, motion_tensors, sparsectrl_tensors, write
from tests.control import controlnet_tensors, ip_adapter_tensors
from tests.families import cameractrl_tensors, conditioned_motion_tensors
from tests.features.test_picture_features import folder  # noqa: F401
from tests.nano import entry, write_config

ASSETS = Path(__file__).parents[2] / "animatediff/assets"
ENCODER = {"image_encoder": str(ASSETS / "shapes_encoder.safetensors")}
OTHER_VAE = VAEConfig(block_out_channels=(32, 32, 32, 32), latent_channels=8)
PROJ_UP = "lora_unet_down_blocks_0_attentions_0_proj_in.lora_up.weight"


def resized(tensors: dict[str, Tensor], sizes: dict[int, int]) -> dict[str, Tensor]:
    """Zeros of the same shapes, but for these sizes."""
    return {key: torch.zeros([sizes.get(n, n) for n in t.shape]) for key, t in tensors.items()}


def without(tensors: dict[str, Tensor], part: str) -> dict[str, Tensor]:
    """All but the first whose key has this in it."""
    gone = next(key for key in tensors if part in key)
    return {key: t for key, t in tensors.items() if key != gone}


def file(name: str) -> dict[str, Tensor]:
    return read_state_dict(name).tensors


# What does not fit: tensors of x.safetensors, options that use it, the message. Levels of the image model are 32, 64,
# 64 and 96 wide, its text 40, the embedding of a picture 24.
MISFITS = {
    "LoRA with a layer of another shape": (
        lambda f: file(f / "kohya.safetensors") | {PROJ_UP: torch.zeros(48, 4, 1, 1)},
        {"lora_model_path": "x"},
        r"x.safetensors: got .* up \(48, 4, 1, 1\) in .*lora_unet_down_blocks_0_.* weight \(32, 32, 1, 1\)",
    ),
    "domain adapter": (
        lambda f: resized(file(f / "adapter.safetensors"), {96: 128}),
        {"adapter_lora_path": "x"},
        "x.safetensors: got down .4, 128., .*this LoRA was made for a network of another size",
    ),
    "MotionLoRA": (
        lambda f: resized(file(f / "motion_lora.safetensors"), {96: 128}),
        {"motion_module": "mm_v2", "motion_module_lora_configs": [{"path": "x"}]},
        "x.safetensors: got down .4, 128., .*this LoRA was made for a network of another size",
    ),
    "words for another text encoder": (
        lambda f: {"emb_params": torch.zeros(2, 768)},
        {"embeddings": ["x"]},
        "x.safetensors: got vectors of 768 numbers, expected 40 as the text encoder has",
    ),
    "words in a LoRA": (
        lambda f: file(f / "kohya.safetensors") | {"bundle_emb.fluffy": torch.zeros(2, 768)},
        {"lora_model_path": "x"},
        "LoRA x: got vectors of 768 numbers, expected 40",
    ),
    "VAE": (
        lambda f: file(save_vae(VAE(OTHER_VAE), f / "vae.safetensors")),
        {"vae_path": "x"},
        "x.safetensors, a VAE of 8 latent channels, for an image model of 4",
    ),
    "personalised model": (
        lambda f: without(ldm_tensors(), "model.diffusion_model.middle_block"),
        {"dreambooth_path": "x"},
        "x.safetensors, expected a complete UNet .*: 1 weights are missing",
    ),
    "motion module": (
        lambda f: without(motion_tensors("v3"), "up_blocks.1"),
        {"motion_module": "x", "version": "v3"},
        "x.safetensors, expected a complete motion module .*: 1 weights are missing",
    ),
    "further motion module": (
        lambda f: without(motion_tensors("v3"), "up_blocks.1"),
        {"extra_motion_modules": [{"path": "x", "version": "v3"}]},
        "x.safetensors, expected a complete motion module .*: 1 weights are missing",
    ),
    "PIA": (
        lambda f: conditioned_motion_tensors("pia") | {"conv_in.weight": torch.zeros(32, 10, 3, 3)},
        {"motion_module": "x", "pia": {"image": "a.png"}},
        r"x.safetensors: got a conv_in of shape \(32, 10, 3, 3\), expected \(32, 9, 3, 3\)",
    ),
    "AnimateLCM-I2V": (
        lambda f: without(conditioned_motion_tensors("animatelcm_i2v"), "img_encoder."),
        {"motion_module": "x", "i2v": {"image": "a.png"}},
        "x.safetensors, expected a complete animatelcm-i2v network for pictures .*: 1 weights are missing",
    ),
    "ControlNet": (
        lambda f: resized(controlnet_tensors(), {96: 128}),
        {"controlnet": {"path": "x", "images": "hints"}},
        r"x.safetensors: got a ControlNet of block_out_channels \(32, 64, 64, 128\), expected the base's",
    ),
    "SparseCtrl": (
        lambda f: resized(sparsectrl_tensors("rgb"), {40: 48}),
        {"controlnet_path": "x", "controlnet_images": ["a.png"]},
        "x.safetensors: got a SparseCtrl encoder of context_dim 48, expected the base's 40",
    ),
    "CameraCtrl": (
        lambda f: resized(cameractrl_tensors(), {96: 128}),
        {"camera": {"path": "x", "move": "zoom_in"}},
        r"x.safetensors: got CameraCtrl of widths \(32, 64, 64, 128\) for",
    ),
    "IP-Adapter of another context": (
        lambda f: resized(ip_adapter_tensors("base"), {40: 48}),
        {"ip_adapter": {"path": "x", "images": "a.png"}, **ENCODER},
        "x.safetensors: got an IP-Adapter of context_dim 48, expected the base's 40",
    ),
    "IP-Adapter of other layers": (
        lambda f: resized(ip_adapter_tensors("base"), {96: 128}),
        {"ip_adapter": {"path": "x", "images": "a.png"}, **ENCODER},
        "x.safetensors: got an IP-Adapter for cross-attentions of widths .*128",
    ),
    "image encoder": (
        lambda f: ip_adapter_tensors("base"),
        {"ip_adapter": {"path": "x", "images": "a.png"}, **ENCODER},
        "shapes_encoder.safetensors with embeddings of width 64, expected 24 for .*x.safetensors",
    ),
    "a layer of the text encoder": (lambda f: {}, {"clip_skip": 9}, "clip_skip: got 9, expected 1 .* to 2, the layers"),
}


@pytest.fixture
def files(folder, monkeypatch):  # noqa: F811
    """The files of all families, of which no weight may be read."""

    def shapes_alone(tensors, device, dtype):
        assert all(t.is_meta for t in tensors.values()), "weights are read"
        return converted(tensors, device, dtype)

    def hashed(path):
        pytest.fail(f"{path} is read as a whole")

    monkeypatch.setattr("animatediff.checkpoints.load.converted", shapes_alone)
    monkeypatch.setattr("animatediff.checkpoints.files.file_hashes", hashed)
    return folder


def located(files: Path, value: object) -> object:
    """With the names of files as their paths."""
    if isinstance(value, dict):
        return {key: located(files, v) for key, v in value.items()}
    if isinstance(value, list):
        return [located(files, v) for v in value]
    known = (files / f"{value}.safetensors", files / str(value))
    return next((str(path) for path in known if path.exists()), value)


def second(files: Path, tmp_path: Path, options: dict[str, object]) -> Path:
    """A config whose first entry is right."""
    common = {"H": 64, "W": 64}
    bad = entry(files, **common, name="second", **located(files, options))
    return write_config(tmp_path / "x.yaml", entry(files, **common), bad)


@pytest.mark.parametrize("kind", MISFITS)
def test_what_does_not_fit_is_told_before_a_weight_is_read(files, tmp_path, kind):
    made, options, message = MISFITS[kind]
    write(files / "x.safetensors", made(files) or {"x": torch.zeros(2)}, **METADATA)
    path = second(files, tmp_path, options)
    with pytest.raises(UserError, match=f"^entry second: .*{message}") as error:
        main(["--config", str(path), "--device", "cpu", "--output-dir", str(tmp_path / "out")])
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


EVERYTHING = {  # that fits
    "dreambooth_path": "nano",
    "lora_model_path": "kohya",
    "adapter_lora_path": "adapter",
    "motion_module": "mm_v2",
    "motion_module_lora_configs": [{"path": "motion_lora"}],
    "embeddings": ["word"],
    "controlnet": {"path": "control", "images": "hints"},
    "ip_adapter": [{"path": "base", "images": "a.png"}],
    "image_encoder": "image_encoder",
    "extra_motion_modules": [{"path": "mm_v1", "version": "v1"}],
}


@pytest.fixture
def everything(files, tmp_path):
    """A request of every kind of network, checked."""
    write(files / "word.safetensors", {"emb_params": torch.zeros(2, 40)})
    return check_requests(load_config(second(files, tmp_path, EVERYTHING)).entries)[1]


def test_networks_without_contents(everything):
    """No weight is read, not even to be hashed: all of them are shapes on the meta device."""
    with without_contents():
        model = Assembler(torch.device("meta"), torch.float32).load(everything)
    tensors = [t for network in (*model.modules(), model.loras) for t in network.state_dict().values()]
    assert len(tensors) > 2000 and all(t.is_meta for t in tensors)
    assert len(model.loras.names) == 3 and model.networks.keys() == {"controlnets", "ip_adapters", "mixture"}


def test_every_set_of_files_is_rehearsed_once(make_entry, nano, monkeypatch):
    """But a first one that loading itself tells as soon."""
    lora = {"lora_model_path": str(nano / "kohya.safetensors")}
    entries = [{}, {"seed": 1}, lora, {"prompt": ["other"]} | lora, {"H": 24} | lora, {"motion_module": ""}]
    seen: list[str] = []
    monkeypatch.setattr(Assembler, "load", lambda self, checked: seen.append(checked.request.output.name))
    checked = check_requests(make_entry(name=str(i), **values) for i, values in enumerate(entries))
    for some, next_, expected in (
        (checked, False, "245"),
        (checked[2:], False, "245"),
        (checked[2:], True, "45"),
        (checked[:2], False, ""),
        (checked[5:], False, ""),
    ):
        rehearse(some, loaded_next=next_)
        assert "".join(seen) == expected
        seen.clear()
    monkeypatch.setattr("animatediff.pipeline.rehearse.QUICK", 0)  # what is large takes time to load
    rehearse(checked[2:], loaded_next=True)
    assert "".join(seen) == "245"


def test_clips_are_the_same_without_a_rehearsal(folder, tmp_path, monkeypatch):  # noqa: F811
    lora = entry(folder, lora_model_path=str(folder / "kohya.safetensors"))
    config = write_config(tmp_path / "x.yaml", entry(folder), lora)
    main(["--config", str(config), "--device", "cpu", "--output-dir", str(tmp_path / "rehearsed")])
    monkeypatch.setattr("animatediff.pipeline.run.rehearse", lambda *_, **__: None)
    main(["--config", str(config), "--device", "cpu", "--output-dir", str(tmp_path / "not")])
    one, other = (sorted((tmp_path / name / "sample").iterdir()) for name in ("rehearsed", "not"))
    assert len(one) == 2 and [file.read_bytes() for file in one] == [file.read_bytes() for file in other]


@pytest.mark.slow
def test_a_rehearsal_imports_no_compiler():
    """Which torch does, for seconds, where numbers without contents are added or joined."""
    code = """if True:
        import sys
        from animatediff.config.prompt_yaml import load_config
        from animatediff.pipeline.headers import check_requests
        from animatediff.pipeline.rehearse import rehearse

        rehearse(check_requests(load_config("configs/animate/shapes-ip-adapter.yaml").entries))
        assert not {"sympy", "torch._dynamo"} & set(sys.modules)"""
    subprocess.run([sys.executable, "-c", code], check=True)
