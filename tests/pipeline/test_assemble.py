"""Files to networks: checked before loading, in the official order, and nothing leaks from entry to entry."""

import pytest
import torch

from animatediff.checkpoints.files import read_state_dict
from animatediff.checkpoints.known_files import SOURCES, find_file
from animatediff.config.networks import MOTION_VERSIONS
from animatediff.config.request import Windows
from animatediff.pipeline.assemble import Assembler
from animatediff.pipeline.headers import check_requests
from animatediff.utils import UserError
from tests.checkpoints.synthetic import ldm_tensors, motion_tensors, with_positional, write


def weights_of(components) -> dict[str, torch.Tensor]:
    named = {"unet": components.unet, "vae": components.vae, "text": components.text_encoder}
    return {f"{name}.{key}": t.clone() for name, net in named.items() for key, t in net.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.fixture
def loras(nano):
    return {
        "lora_model_path": str(nano / "kohya.safetensors"),
        "lora_alpha": 0.8,
        "adapter_lora_path": str(nano / "adapter.safetensors"),
        "motion_module_lora_configs": [{"path": str(nano / "motion_lora.safetensors"), "alpha": 0.5}] * 2,
        "motion_module": str(nano / "mm_v2.safetensors"),
    }


@pytest.mark.slow
def test_nothing_leaks_into_the_next_entry(nano, make_entry, loras):
    """After an entry with a personalised model, its own VAE and every kind of LoRA, the base comes out as from disk."""
    other = {key: tensor * 1.5 for key, tensor in ldm_tensors().items()}
    path = write(nano / "personal.safetensors", other, text_num_heads="4")
    plain, changed, lora_only = check_requests(
        [make_entry(), make_entry(dreambooth_path=str(path), **loras), make_entry(**loras)]
    )
    fresh = weights_of(Assembler(torch.device("cpu"), torch.float32).assemble(plain))
    assembler = Assembler(torch.device("cpu"), torch.float32)
    for entry in (changed, lora_only):
        touched = weights_of(assembler.assemble(entry))
        for name in (
            "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight",
            "unet.down_blocks.0.motion_modules.0.temporal_transformer.transformer_blocks.0.attention_blocks.0.to_q.weight",
            "text.text_model.encoder.layers.0.self_attn.q_proj.weight",
        ):
            assert not torch.equal(touched[name], fresh[name])
        assert torch.equal(touched["vae.encoder.conv_in.weight"], fresh["vae.encoder.conv_in.weight"]) == (
            entry is lora_only
        )
    assert same(weights_of(assembler.assemble(plain)), fresh)
    alone = weights_of(Assembler(torch.device("cpu"), torch.float32).assemble(changed))
    assert same(weights_of(assembler.assemble(changed)), alone)


def test_reports_and_scales(make_entry, loras):
    """Every file has its line, in the official order; scales are as configured and can be changed."""
    components = Assembler(torch.device("cpu"), torch.float32).assemble(check_requests([make_entry(**loras)])[0])
    kinds = ["sd1-checkpoint", "motion-module v2", "lora kohya", "domain-adapter", "motion-lora", "motion-lora"]
    assert all(kind in line for kind, line in zip(kinds, components.reports, strict=True))
    assert "applied 612 of 612 keys" in components.reports[2]
    assert components.loras.names == ["kohya", "adapter", "motion_lora", "motion_lora-2"]
    assert [lora.scale for lora in components.loras.loras] == [0.8, 1.0, 0.5, 0.5]
    merged = weights_of(components)
    components.loras.set_scale("kohya", 0.1)
    assert components.loras.merged and not same(weights_of(components), merged)


@pytest.mark.slow
def test_the_official_rule_ignores_the_alpha_of_a_lora_file(nano, make_entry):
    """A file with alpha = rank / 2, at full scale and without its alpha at half of it, changes the weights equally."""
    halved = {
        k: t / 2 if k.endswith(".alpha") else t for k, t in read_state_dict(nano / "kohya.safetensors").tensors.items()
    }
    path = str(write(nano / "halved.safetensors", halved))
    entries = [
        make_entry(lora_model_path=path, lora_alpha=1.0),
        make_entry(lora_model_path=path, lora_alpha=0.5, lora_alpha_rule="official"),
    ]
    one, other = (Assembler(torch.device("cpu"), torch.float32).assemble(c) for c in check_requests(entries))
    assert same(weights_of(one), weights_of(other))


def test_no_motion_module_is_the_image_model(make_entry):
    components = Assembler(torch.device("cpu"), torch.float32).assemble(
        check_requests([make_entry(motion_module="")])[0]
    )
    assert components.unet.config.motion is None and len(components.reports) == 1


def test_v_prediction_comes_from_the_base(nano, make_entry):
    base = write(nano / "v.safetensors", ldm_tensors(), text_num_heads="4", prediction_type="v_prediction")
    (entry,) = check_requests([make_entry(pretrained_model_path=str(base))])
    components = Assembler(torch.device("cpu"), torch.float32).assemble(entry)
    assert components.schedule.prediction_type == "v_prediction" and components.schedule.beta_schedule == "linear"


def test_zero_terminal_snr_and_spacing_come_from_the_image_model(nano, make_entry):
    said = {"prediction_type": "v_prediction", "timestep_spacing": "trailing", "text_num_heads": "4"}
    path = write(nano / "zero.safetensors", ldm_tensors() | {"ztsnr": torch.zeros(0)}, **said)
    (checked,) = check_requests([make_entry(dreambooth_path=str(path))])
    assert checked.request.sampling.timestep_spacing == "trailing"
    schedule = Assembler(torch.device("cpu"), torch.float32).assemble(checked).schedule
    assert schedule.rescale_betas_zero_snr and schedule.prediction_type == "v_prediction"


def test_words_that_are_packed_into_a_lora(nano, make_entry):
    bundled = read_state_dict(nano / "kohya.safetensors").tensors | {"bundle_emb.fluffy": torch.ones(2, 40)}
    path = write(nano / "bundle.safetensors", bundled)
    (checked,) = check_requests([make_entry(lora_model_path=str(path))])
    model = Assembler(torch.device("cpu"), torch.float32).assemble(checked)
    plain, word = model.tokenizer(["a fox"])[0, 0], model.tokenizer(["a fluffy"])[0, 0]
    assert (word >= 49408).sum() == 2 and not (plain >= 49408).any()


def test_a_base_without_vae(nano, make_entry):
    """Named; and a personalised model without one takes the base's."""
    tensors = {key: t for key, t in ldm_tensors().items() if not key.startswith("first_stage_model.")}
    path = str(write(nano / "novae.safetensors", tensors, text_num_heads="4"))
    assembler = Assembler(torch.device("cpu"), torch.float32)
    with pytest.raises(UserError, match="novae.safetensors without a VAE"):
        assembler.assemble(check_requests([make_entry(pretrained_model_path=path)])[0])
    components = assembler.assemble(check_requests([make_entry(dreambooth_path=path)])[0])
    assert "no VAE in it: the base model's is used" in components.reports[0]


def test_a_text_encoder_of_another_vocabulary(nano, make_entry):
    key = "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"
    tensors = ldm_tensors() | {key: ldm_tensors()[key][:100]}
    (checked,) = check_requests([make_entry(pretrained_model_path=str(write(nano / "few.safetensors", tensors)))])
    with pytest.raises(UserError, match="few.safetensors whose text encoder knows 100 tokens, expected .* 49408"):
        Assembler(torch.device("cpu"), torch.float32).assemble(checked)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"motion_module": "nowhere/mm.ckpt"}, r"motion_module: there is no nowhere/mm.ckpt \(searched: .*nowhere/mm"),
        ({"motion_module": "x/v3_sd15_mm.ckpt"}, "download it from https://huggingface.co/guoyww/animatediff and put"),
        ({"pretrained_model_path": "runwayml/stable-diffusion-v1-5"}, "nothing is downloaded for you"),
        ({"inference_config": "nowhere.yaml"}, "inference_config: there is no nowhere.yaml"),
        ({"motion_module": "{nano}/motion_lora.safetensors"}, "this is a MotionLoRA, not a motion module"),
        ({"motion_module": "{nano}/nano.safetensors"}, "an SD 1.x image model in one file, not a motion module"),
        ({"lora_model_path": "{nano}/motion_lora.safetensors"}, "this is a MotionLoRA, not a LoRA of an image model"),
        ({"dreambooth_path": "{nano}/kohya.safetensors"}, "dreambooth_path: .* not an SD 1.x or SDXL image model"),
        (
            {"motion_module_lora_configs": [{"path": "{nano}/kohya.safetensors"}]},
            r"motion_module_lora_configs\[0\].path: .*not a MotionLoRA",
        ),
        ({"motion_module": "{nano}"}, "entry second: motion_module: got the folder .* expected a diffusers model"),
        (
            {"motion_module": "", "motion_module_lora_configs": [{"path": "{nano}/motion_lora.safetensors"}]},
            "second: got motion_module_lora_configs without a motion_module",
        ),
        ({"inference_config": "configs/inference/inference-v1.yaml"}, "describes a v1 module .* motion module is v3"),
        ({"inference_config": "configs/inference/inference-v2.yaml"}, "describes a v2 module .* motion module is v3"),
        ({"inference_config": "{nano}/cosine.yaml"}, "cosine.yaml: got beta_schedule 'cosine', expected one of linear"),
        ({"L": 33}, "L: got 33 frames, expected at most 32, .* make 32 frames, or set max_frames=33 at your own risk"),
        ({"L": 33}, r"in overlapping windows by windows=open \(closed: a loop\)"),
        ({"L": 40, "window_schedule": "opn"}, "second: window_schedule: got 'opn', expected open or closed"),
        (
            {"L": 40, "window_schedule": "open", "window_length": 33},
            "window_length: got 33 frames, expected at most 32",
        ),
        ({"L": 40, "window_schedule": "open", "window_overlap": 16}, "window_overlap: got 16, expected 0 to 15"),
        ({"window_overlap": 2}, "window_overlap: got 2 without a window_schedule: add window_schedule=open"),
        ({"L": 25, "motion_module": "{nano}/mm_v1.safetensors"}, "expected at most 24"),
        ({"steps": 1001}, "steps: got 1001, expected at most 1000"),
        ({"version": "v2"}, "mm_v3.safetensors is a v3 module, but the entry says `version: v2`"),
        ({"motion_module": "{nano}/odd.safetensors"}, "motion_module: .*odd.safetensors: got max_frames 'many'"),
        (
            {"pag_scale": 2, "pag_layers": "top"},
            "pag_layers: got 'top', expected layers with attention, such as down",
        ),
    ],
)
def test_mistakes_are_named_before_anything_is_sampled(nano, make_entry, values, message):
    (nano / "cosine.yaml").write_text("noise_scheduler_kwargs: {beta_schedule: cosine}")
    write(nano / "odd.safetensors", motion_tensors("v3"), version="v3", max_frames="many")

    def place(value):
        if isinstance(value, list):
            return [{key: place(v) for key, v in item.items()} for item in value]
        return value.replace("{nano}", str(nano)) if isinstance(value, str) else value

    good, values = make_entry(), {key: place(value) for key, value in values.items()}
    with pytest.raises(UserError, match=message) as error:
        bad = make_entry(name="second", **values)
        checked = check_requests([good, bad])
        Assembler(torch.device("cpu"), torch.float32).assemble(checked[1])
    assert "\n" not in str(error.value)


def test_all_files_are_looked_for_before_any_is_opened(nano, make_entry):
    (nano / "broken.safetensors").write_bytes(b"<html>")
    entries = [make_entry(motion_module=str(nano / "broken.safetensors")), make_entry(lora_model_path="missing.ckpt")]
    with pytest.raises(UserError, match="there is no missing.ckpt"):
        check_requests(entries)


@pytest.mark.slow
def test_version_of_a_stripped_module(nano, make_entry):
    """v1 and v3 without positional encodings are one layout: the entry or its inference config decides."""
    path = str(write(nano / "stripped.safetensors", motion_tensors("v1")))
    with pytest.raises(UserError, match="add `version: v1` or `version: v3`"):
        check_requests([make_entry(motion_module=path)])
    for values in ({"version": "v1"}, {"inference_config": "configs/inference/inference-v1.yaml"}):
        (checked,) = check_requests([make_entry(motion_module=path, **values)])
        motion = Assembler(torch.device("cpu"), torch.float32).assemble(checked).unet.config.motion
        assert motion == MOTION_VERSIONS["v1"]


def test_longer_clips_on_request(nano, make_entry):
    path = str(write(nano / "v1_pe.safetensors", with_positional(motion_tensors("v1"), 24)))
    (checked,) = check_requests([make_entry(motion_module=path, max_frames=30, L=30)])
    assert Assembler(torch.device("cpu"), torch.float32).assemble(checked).unet.config.motion.max_frames == 30


def test_windows_are_completed(make_entry):
    """What the entry leaves open is filled in."""
    (checked,) = check_requests([make_entry(L=64, window_schedule="closed")])
    assert checked.request.windows == Windows("closed", 16, 4, "pyramid")
    (checked,) = check_requests(
        [
            make_entry(
                L=64, window_schedule="uniform", window_length=8, window_overlap=0, window_stride=2, window_fuse="flat"
            )
        ]
    )
    assert checked.request.windows == Windows("uniform", 8, 0, "flat", 2)
    assert check_requests([make_entry()])[0].request.windows is None


def test_norm_over_frames(make_entry):
    (checked,) = check_requests([make_entry(norm_over_frames=True)])
    assert Assembler(torch.device("cpu"), torch.float32).assemble(checked).unet.config.motion.norm_over_frames


def test_files_are_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_file("configs/inference/inference-v1.yaml") is not None
    (tmp_path / "configs").mkdir()
    assert find_file("configs").samefile(tmp_path / "configs")  # the current folder goes first
    assert find_file("no/such/file") is None


def test_every_shipped_config_names_files_with_a_source():
    from animatediff.checkpoints.known_files import REPOSITORY
    from animatediff.config.prompt_yaml import load_config
    from animatediff.config.spellings import files

    for path in sorted((REPOSITORY / "configs/animate").glob("*.yaml")):
        for entry in load_config(path).entries:
            for file in (f.path for f in files(entry).values() if f.kind.kinds):
                assert file.startswith("animatediff/assets/") or file.rpartition("/")[2] in SOURCES, (path, file)
