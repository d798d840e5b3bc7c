"""ComfyUI's workflow (the graph as it is drawn) as a prompt (the graph as it is run).

`{"nodes": [{"id": 3, "type": "KSampler", "inputs": [{"name": "model", "link": 1}], "widgets_values": [5, "fixed", 20,
…]}], "links": [[1, from node, from slot, to node, to slot, type], …]}`: values have no names, only an order, which is
each kind of node's own. It is known here of those that `comfy_prompt` reads.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

Node = dict[str, Any]
NEVER, BYPASSED = 2, 4  # modes of nodes
MOST_VALUES = 100  # of a node
FILE = re.compile(r"\.(safetensors|ckpt|pth?|bin|gguf|onnx|png|jpe?g|webp|gif|mp4)$", re.IGNORECASE)
AFTER_SEED = (  # what becomes of a number in the next run; stands behind it
    "fixed",
    "increment",
    "decrement",
    "randomize",
)
_CONTEXT = ("context_length", "context_stride", "context_overlap")
WIDGETS: dict[str, tuple[str, ...]] = {  # kind of node -> names of its values, in their order
    "KSampler": ("seed", "steps", "cfg", "sampler_name", "scheduler", "denoise"),
    "KSamplerAdvanced": ("add_noise", "noise_seed", "steps", "cfg", "sampler_name", "scheduler", "start_at_step"),
    "SamplerCustom": ("add_noise", "noise_seed", "cfg"),
    "RandomNoise": ("noise_seed",),
    "CFGGuider": ("cfg",),
    "KSamplerSelect": ("sampler_name",),
    "BasicScheduler": ("scheduler", "steps", "denoise"),
    "CheckpointLoaderSimple": ("ckpt_name",),
    "VAELoader": ("vae_name",),
    "LoraLoader": ("lora_name", "strength_model", "strength_clip"),
    "LoraLoaderModelOnly": ("lora_name", "strength_model"),
    "CLIPTextEncode": ("text",),
    "CLIPTextEncodeSDXL": ("width", "height", "crop_w", "crop_h", "target_width", "target_height", "text_g", "text_l"),
    "CLIPSetLastLayer": ("stop_at_clip_layer",),
    "EmptyLatentImage": ("width", "height", "batch_size"),
    "ADE_EmptyLatentImageLarge": ("width", "height", "batch_size"),
    "FreeU": ("b1", "b2", "s1", "s2"),
    "BatchPromptSchedule": ("text", "max_frames", "print_output", "pre_text", "app_text"),
    "ADE_AnimateDiffLoaderWithContext": ("model_name", "beta_schedule", "motion_scale"),
    "ADE_AnimateDiffLoaderGen1": ("model_name", "beta_schedule"),
    "ADE_LoadAnimateDiffModel": ("model_name",),
    "ADE_UseEvolvedSampling": ("beta_schedule",),
    "ADE_AnimateDiffLoRALoader": ("name", "strength"),
    "ADE_LoopedUniformContextOptions": (*_CONTEXT, "closed_loop", "fuse_method"),
    "ADE_AnimateDiffUniformContextOptions": (*_CONTEXT, "context_schedule", "closed_loop", "fuse_method"),
    "ADE_StandardUniformContextOptions": (*_CONTEXT, "fuse_method"),
    "ADE_StandardStaticContextOptions": ("context_length", "context_overlap", "fuse_method"),
    "ADE_AnimateDiffCombine": ("frame_rate", "loop_count", "filename_prefix", "format", "pingpong"),
    "SaveAnimatedWEBP": ("filename_prefix", "fps"),
}


def as_prompt(workflow: dict[str, Any]) -> dict[str, Node] | None:
    """The nodes of a workflow by their numbers, as a prompt has them; None of what is no workflow."""
    nodes, links = workflow.get("nodes"), workflow.get("links")
    if not isinstance(nodes, list) or not isinstance(links, list):
        return None
    plain = {str(n.get("id")): n for n in nodes if isinstance(n, dict) and isinstance(n.get("type"), str)}
    drawing = _Drawing(plain, {link[0]: link for link in links if _is_link(link)})
    running = ((number, node) for number, node in plain.items() if node.get("mode") not in (NEVER, BYPASSED))
    return {number: {"class_type": node["type"], "inputs": dict(drawing.inputs(node))} for number, node in running}


def _is_link(link: object) -> bool:
    return isinstance(link, list) and len(link) >= 4 and all(isinstance(part, (int, str)) for part in link[:3])


class _Drawing:
    """Nodes by number, and links by number; nothing in them is trusted."""

    def __init__(self, nodes: dict[str, Node], links: dict[Any, list[Any]]):
        self.nodes, self.links = nodes, links

    def inputs(self, node: Node) -> Iterator[tuple[str, Any]]:
        """Values first, then links, which take the place of values."""
        yield from _values(node)
        for slot in _slots(node):
            if (source := self.source(slot)) is not None:
                yield str(slot.get("name")), source

    def source(self, slot: Node) -> list[Any] | None:
        """The node and its output that a slot is linked to; one that is bypassed hands on what it is given."""
        for _ in range(20):
            number = slot.get("link")
            link = self.links.get(number) if isinstance(number, (int, str)) else None
            node = self.nodes.get(str(link[1])) if link else None
            if link is None or node is None:
                return None
            if node.get("mode") != BYPASSED:
                return [str(link[1]), link[2]]
            slot = next((s for s in _slots(node) if s.get("type") == slot.get("type")), {})
        return None


def _slots(node: Node) -> list[Node]:
    slots = node.get("inputs")
    return [slot for slot in slots if isinstance(slot, dict)] if isinstance(slots, list) else []


def _values(node: Node) -> Iterator[tuple[str, Any]]:
    """A node's values by name: as it says itself or its kind does; of others the first one is called `value`."""
    values = node.get("widgets_values")
    if isinstance(values, dict):
        yield from values.items()
        return
    every = values[:MOST_VALUES] if isinstance(values, list) else []
    plain = [v for i, v in enumerate(every) if not (i and type(every[i - 1]) is int and v in AFTER_SEED)]
    drawn = [s["widget"].get("name") for s in _slots(node) if isinstance(s.get("widget"), dict)]
    usual = [_usual(i, value) for i, value in enumerate(plain)]
    names = WIDGETS.get(node["type"]) or (drawn if len(drawn) == len(plain) else usual)
    yield from ((str(name), value) for name, value in zip(names, plain, strict=False))


def _usual(i: int, value: object) -> str:
    """A name for a value of a node that is not known; `…_name` of a file's, as loaders call it."""
    return f"file {i}_name" if isinstance(value, str) and FILE.search(value) else f"value {i}" if i else "value"
