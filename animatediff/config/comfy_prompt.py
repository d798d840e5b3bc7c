"""ComfyUI's prompt (the graph as it was run) or workflow, also with AnimateDiff-Evolved's nodes, in our words.

`{"3": {"class_type": "KSampler", "inputs": {"seed": 1, "model": ["4", 0], …}}, …}`: an input is a value or a link to
another node. What is upstream of the sampler that begins with noise makes the clip.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from animatediff.config.comfy_workflow import as_prompt
from animatediff.config.foreign_settings import ForeignSettings
from animatediff.config.prompt_warnings import WEIGHT

Node = dict[str, Any]
MOST_NODES = 10_000
TEXTS = ("text", "text_g", "string", "value", "prompt", "positive", "wildcard_text", "populated_text")
NUMBERS = ("value", "int", "float", "number", "seed", "noise_seed", "INT", "FLOAT")
EMBEDDING = re.compile(r"embedding:([^\s,:()<>]+)")
KEYFRAME = re.compile(r'"(\d{1,6})"\s*:\s*"((?:[^"\\]|\\.)*)"')
SCHEDULERS = {  # nodes that are one
    "KarrasScheduler": "karras", "ExponentialScheduler": "exponential", "PolyexponentialScheduler": "polyexponential",
    "AlignYourStepsScheduler": "align_your_steps", "SDTurboScheduler": "turbo", "BetaSamplingScheduler": "beta",
}  # fmt: skip
KNOWN = (  # nodes that are read, or change nothing that is
    "KSampler", "KSamplerAdvanced", "SamplerCustom", "SamplerCustomAdvanced", "KSamplerSelect", "BasicScheduler",
    "RandomNoise", "CFGGuider", "BasicGuider", "CheckpointLoaderSimple",
    "LoraLoader", "LoraLoaderModelOnly", "CLIPTextEncode", "CLIPSetLastLayer", "VAELoader", "VAEDecode", "FreeU",
    "VAEDecodeTiled", "EmptyLatentImage", "ADE_EmptyLatentImageLarge", "SaveImage", "PreviewImage", "SaveAnimatedWEBP",
    "SaveAnimatedPNG", "VHS_VideoCombine", "ADE_AnimateDiffCombine", "Reroute", "Note", "PrimitiveNode",
    "BatchPromptSchedule", "ADE_AnimateDiffLoaderWithContext", "ADE_AnimateDiffLoaderGen1", "ADE_LoadAnimateDiffModel",
    "ADE_UseEvolvedSampling", "ADE_ApplyAnimateDiffModelSimple", "ADE_ApplyAnimateDiffModel", "SaveVideo", "SaveWEBM",
    "CLIPTextEncodeSDXL",
    "ADE_AnimateDiffLoRALoader", "CreateVideo",
)  # fmt: skip
CONTEXTS = {  # AnimateDiff-Evolved's context options -> our window schedules
    "ADE_LoopedUniformContextOptions": "uniform",
    "ADE_AnimateDiffUniformContextOptions": "uniform",
    "ADE_StandardUniformContextOptions": "open",
    "ADE_StandardStaticContextOptions": "static",
}
FUSED = {"flat": "flat", "pyramid": "pyramid", "overlap-linear": "overlap-linear", "gauss-sigma": "gaussian"}


def read_prompt(text: str) -> ForeignSettings | None:
    """What a prompt or a workflow in JSON says; None if it is neither, or has no sampler that is known."""
    try:
        graph = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if isinstance(graph, dict):
        graph = as_prompt(graph) or graph
    if not isinstance(graph, dict) or len(graph) > MOST_NODES:
        return None
    reader = _Reader({str(name): node for name, node in graph.items() if _is_node(node)})
    try:
        sampler = reader.sampler()
        return reader.read(sampler) if sampler else None
    except RecursionError:  # of values that are nested for no other purpose
        return None


def _is_node(node: object) -> bool:
    return isinstance(node, dict) and isinstance(node.get("class_type"), str) and isinstance(node.get("inputs"), dict)


def _is_sampler(node: Node) -> bool:
    """KSampler and those of its kind, or SamplerCustom; SamplerCustomAdvanced with what its parts are given."""
    inputs = node["inputs"].keys()
    return {"cfg", "positive", "model"} <= inputs and bool({"seed", "noise_seed"} & inputs)


def _is_understood(node: Node) -> bool:
    """Whether it is one of those that are read, or holds nothing but a text or a number."""
    names_file = any(name.endswith("_name") for name in node["inputs"])
    is_value = not names_file and not any(isinstance(value, list) for value in node["inputs"].values())
    return is_value or node["class_type"] in (*KNOWN, *CONTEXTS)


class _Reader:
    """One graph; nothing in it is trusted: links may lead nowhere or in circles."""

    def __init__(self, nodes: dict[str, Node]):
        self.nodes = nodes
        self.found = ForeignSettings("ComfyUI")
        for node in [n for n in nodes.values() if {"noise", "guider"} <= n["inputs"].keys()]:
            node["inputs"] |= self.parts(node)

    # the graph

    def behind(self, node: Node, name: str) -> Node | None:
        """The node that an input is linked to; routers are passed through."""
        value = node["inputs"].get(name)
        other = self.nodes.get(str(value[0])) if isinstance(value, list) and len(value) == 2 else None
        for _ in range(20):
            if other is None or other["class_type"] != "Reroute":
                return other
            link = next(iter(other["inputs"].values()), None)
            other = self.nodes.get(str(link[0])) if isinstance(link, list) and len(link) == 2 else None
        return None

    def parts(self, sampler: Node) -> dict[str, Any]:
        """What SamplerCustomAdvanced is given by way of its noise and its guider; without a negative text, no CFG."""
        noise, guider = (part["inputs"] if (part := self.behind(sampler, name)) else {} for name in ("noise", "guider"))
        plain = {"cfg": 1.0, "positive": guider["conditioning"]} if "conditioning" in guider else {}
        return dict.fromkeys(("cfg", "positive", "model")) | {"noise_seed": noise.get("noise_seed")} | plain | guider

    def upstream(self, start: Node | None) -> Iterator[Node]:
        """A node and all that it is made from, the nearest first."""
        waiting, seen = [start] if start else [], set()
        while waiting:
            node = waiting.pop(0)
            if id(node) in seen:
                continue
            seen.add(id(node))
            yield node
            waiting += [other for name in node["inputs"] if (other := self.behind(node, name))]

    def value(self, node: Node, name: str, kinds: tuple[str, ...] = NUMBERS) -> Any:
        """An input's value, or that of the node which it is linked to, if that has a plain one."""
        for _ in range(20):
            value = node["inputs"].get(name)
            if not isinstance(value, list):
                return value
            other = self.behind(node, name)
            if other is None:
                return None
            node, name = other, next((kind for kind in kinds if kind in other["inputs"]), "")
        return None

    def one(self, start: Node | None, *kinds: str) -> Node | None:
        return next((node for node in self.upstream(start) if node["class_type"] in kinds), None)

    def with_input(self, start: Node | None, name: str) -> Node | None:
        return next((node for node in self.upstream(start) if name in node["inputs"]), None)

    def sampler(self) -> Node | None:
        """The one that begins with noise, where several follow each other: the one with no other upstream."""
        every = [node for node in self.nodes.values() if _is_sampler(node)][:50]
        first = next((n for n in every if not any(o is not n and _is_sampler(o) for o in self.upstream(n))), None)
        for other in every:
            if first and other is not first:
                self.found.miss(f"another sampler, {other['class_type']} of {self.value(other, 'steps')} steps")
        return first

    # the settings

    def read(self, sampler: Node) -> ForeignSettings:
        self._sampling(sampler)
        self._latents(sampler)
        sides = ("positive", "negative")
        texts = [self._text(sampler, side) if side in sampler["inputs"] else "" for side in sides]
        negative = texts[1] if isinstance(texts[1], str) else next(iter(texts[1].values()), "")
        self.found.prompts(texts[0], negative)
        if any(WEIGHT.search(t) for t in (*(texts[0].values() if isinstance(texts[0], dict) else texts[:1]), negative)):
            self.found.miss("its way of weighting words (AUTOMATIC1111's is taken)")
        self._models(sampler)
        self._motion(sampler)
        self._output()
        for kind in sorted({node["class_type"] for node in self.upstream(sampler) if not _is_understood(node)}):
            self.found.miss(f"node {kind}")
        return self.found

    def _sampling(self, sampler: Node) -> None:
        inputs, found = sampler["inputs"], self.found
        scheduled = self.with_input(self.behind(sampler, "sigmas"), "steps") or sampler
        chosen = self.behind(sampler, "sampler") or sampler
        seed = self.value(sampler, "noise_seed" if "noise_seed" in inputs else "seed")
        found.number("sampling.seed", seed, "seed", int)
        found.number("sampling.steps", self.value(scheduled, "steps"), "steps", int)
        found.number("sampling.guidance_scale", self.value(sampler, "cfg"), "cfg")
        name = self.value(chosen, "sampler_name") or chosen["class_type"]
        scheduler = self.value(scheduled, "scheduler") or SCHEDULERS.get(scheduled["class_type"], "")
        found.sampling(str(name), str(scheduler or ""), f"sampler {name}")
        denoise = self.value(scheduled, "denoise")
        if isinstance(denoise, float) and denoise < 1:
            found.miss(f"denoise {denoise:g}")
        if self.value(sampler, "start_at_step") not in (None, 0):
            found.miss(f"start_at_step {self.value(sampler, 'start_at_step')}")

    def _latents(self, sampler: Node) -> None:
        latents = self.one(self.behind(sampler, "latent_image"), "EmptyLatentImage", "ADE_EmptyLatentImageLarge")
        if latents is None:
            self.found.miss("the pictures that it starts from")
            return
        for option, name in (("size.width", "width"), ("size.height", "height"), ("size.num_frames", "batch_size")):
            self.found.number(option, self.value(latents, name), name, int)

    def _text(self, sampler: Node, side: str) -> str | dict[int, str]:
        """The text behind one side, or keyframes of a schedule; its textual inversions become words."""
        encoder = sampler
        for _ in range(20):  # nodes such as ControlNets take both sides, and give both
            if encoder is None or side not in encoder["inputs"]:
                break
            encoder = self.behind(encoder, side)
        for node in self.upstream(encoder):
            text = next((t for name in TEXTS if isinstance(t := self.value(node, name, TEXTS), str)), None)
            if text is None:
                continue
            if node["class_type"].startswith("BatchPromptSchedule") and (frames := KEYFRAME.findall(text)):
                before, after = (str(node["inputs"].get(part) or "") for part in ("pre_text", "app_text"))
                texts = {int(n): ", ".join(t for t in (before, _plain(line), after) if t) for n, line in frames}
                return {frame: self._words(line) for frame, line in texts.items()}
            return self._words(text)
        self.found.miss("a prompt that is put together by other nodes")
        return ""

    def _words(self, text: str) -> str:
        for name in dict.fromkeys(EMBEDDING.findall(text)):
            self.found.want("model.embeddings", name)
        text = EMBEDDING.sub(lambda match: re.split(r"[\\/]", match[1])[-1].rpartition(".")[0] or match[1], text)
        return self.found.without_tags(text)

    def _models(self, sampler: Node) -> None:
        found, model = self.found, self.behind(sampler, "model")
        loras = [n for n in self.upstream(model) if n["class_type"] in ("LoraLoader", "LoraLoaderModelOnly")]
        for node in reversed(loras):
            name, scale = self.value(node, "lora_name"), self.value(node, "strength_model")
            found.want("model.loras", name, scale=scale)
            clip = self.value(node, "strength_clip")
            if node["class_type"] == "LoraLoaderModelOnly" or (clip is not None and clip != scale):
                found.miss(f"LoRA {name}: another strength for the text encoder")
        base = self.with_input(model, "ckpt_name")
        found.want("model.base", base and self.value(base, "ckpt_name"))
        layer = self.one(self.behind(sampler, "positive"), "CLIPSetLastLayer")
        if layer and isinstance(stop := self.value(layer, "stop_at_clip_layer"), int):
            found.put("prompts.clip_skip", -stop, "stop_at_clip_layer")
        decoder = next((n for n in self.nodes.values() if n["class_type"].startswith("VAEDecode")), None)
        if decoder and (vae := self.with_input(self.behind(decoder, "vae"), "vae_name")):
            found.want("model.vae", self.value(vae, "vae_name"))
        if freeu := self.one(model, "FreeU"):
            for name in ("b1", "b2", "s1", "s2"):
                found.number(f"freeu.{name}", self.value(freeu, name), f"FreeU {name}")

    def _motion(self, sampler: Node) -> None:
        found, model = self.found, self.behind(sampler, "model")
        kinds = ("ADE_AnimateDiffLoaderWithContext", "ADE_AnimateDiffLoaderGen1", "ADE_LoadAnimateDiffModel")
        loader = self.one(model, *kinds)
        if loader is None:
            return
        found.want("model.motion_module", self.value(loader, "model_name"))
        scale = self.value(loader, "motion_scale")
        if isinstance(scale, (int, float)) and scale != 1:
            found.put("motion.scale", float(scale), "motion_scale")
        for node in self.upstream(model):
            beta = self.value(node, "beta_schedule")
            if isinstance(beta, str) and not beta.startswith(("autoselect", "sqrt_linear", "use existing")):
                found.miss(f"beta_schedule {beta}")
            if node["class_type"] == "ADE_AnimateDiffLoRALoader":
                found.want("model.motion_loras", self.value(node, "name"), scale=self.value(node, "strength"))
            if node["class_type"] in CONTEXTS:
                self._windows(node)

    def _windows(self, node: Node) -> None:
        found, schedule = self.found, CONTEXTS[node["class_type"]]
        length = self.value(node, "context_length")
        if not isinstance(length, int) or found.values.get("size.num_frames", 0) <= length:
            return
        if schedule == "uniform" and self.value(node, "closed_loop") is False:
            schedule = "open"
        found.put("windows.schedule", schedule, "context_schedule")
        found.put("windows.length", length, "context_length")
        found.number("windows.overlap", self.value(node, "context_overlap"), "context_overlap", int)
        if schedule == "uniform":
            found.number("windows.stride", self.value(node, "context_stride"), "context_stride", int)
        if isinstance(fuse := self.value(node, "fuse_method"), str):
            found.put("windows.fuse", FUSED.get(fuse, fuse), "fuse_method")

    def _output(self) -> None:
        for node in self.nodes.values():
            rate = self.value(node, "frame_rate") or self.value(node, "fps")
            if rate and node["class_type"] in ("VHS_VideoCombine", "ADE_AnimateDiffCombine", "SaveAnimatedWEBP"):
                self.found.number("output.fps", rate, "frame_rate")
                if self.value(node, "pingpong") is True:
                    self.found.put("loop.mode", "pingpong", "pingpong")
                return


def _plain(text: str) -> str:
    try:
        return str(json.loads(f'"{text}"'))
    except ValueError:
        return text
