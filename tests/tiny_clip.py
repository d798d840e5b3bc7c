"""A CLIP of a few weights, as transformers writes it."""

from pathlib import Path

import torch

TINY = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


def write_clip(folder: Path) -> Path:
    """config.json and model.safetensors with random weights, for pictures of 32 pixels and CLIP's own tokens."""
    from transformers import CLIPConfig, CLIPModel  # a second, only for those who need it

    torch.manual_seed(0)
    text = TINY | {"vocab_size": 49408, "eos_token_id": 49407, "bos_token_id": 49406}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=TINY | {"image_size": 32, "patch_size": 8}))
    model.save_pretrained(folder)
    return folder
