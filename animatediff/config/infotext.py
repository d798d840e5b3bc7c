"""AUTOMATIC1111's infotext, also of its forks and of sd-webui-animatediff, in our words.

A prompt of any number of lines, `Negative prompt: …` of any number, and one line of `Name: value, …`, beginning with
`Steps:`; values that hold commas, colons or line breaks are JSON texts.
"""

from __future__ import annotations

import json
import re
from typing import Any

from animatediff.config.foreign_settings import ForeignSettings

FIELD = re.compile(r'(\w[\w /.\-]{0,60}):\s*("(?:[^"\\]|\\.)*"|[^,]*)(?:,|$)')
LISTED_HASH = re.compile(r"([^\s,][^,]{0,200}?):\s*([0-9a-fA-F]{8,64})\s*(?:,|$)")
ITEM = re.compile(r"'?(\w{1,40})'?:\s*'?([^,'{}]*)'?\s*(?:,|$|\})")
LONGEST_FIELDS = 2**16  # characters
KEYFRAME = re.compile(r"\s*(\d{1,6})\s*:(.*)")
NEGATIVE = "Negative prompt:"
SILENT = ("Version", "User", "Model", "Created Date", "Hashes", "Civitai resources", "Civitai metadata")
SILENT += ("RNG", "ENSD")  # of noise, which is another one here anyway
NUMBERS: dict[str, tuple[str, type]] = {
    "Steps": ("sampling.steps", int),
    "CFG scale": ("sampling.guidance_scale", float),
    "Seed": ("sampling.seed", int),
    "Clip skip": ("prompts.clip_skip", int),
}
# Samplers by other names than ComfyUI's once spaces, `++` and capitals are gone.
NAMES = {
    "euler_a": "euler_ancestral",
    "dpm2": "dpm_2",
    "dpm2_a": "dpm_2_ancestral",
    "dpmpp_2s_a": "dpmpp_2s_ancestral",
    "plms": "pndm",
    "unipc": "uni_pc",
}
SCHEDULED = ("Karras", "Exponential", "Polyexponential", "SGM Uniform", "Uniform", "Beta", "Simple", "Normal", "DDIM")
KARRAS_BY_DEFAULT = ("dpmpp_2m", "dpmpp_sde", "dpmpp_2s_ancestral", "dpm_2", "dpm_2_ancestral", "restart")


def read_infotext(text: str) -> ForeignSettings | None:
    """What an infotext says; None if it is none."""
    if "\n" not in text and ("\\nSteps: " in text or "\\n" + NEGATIVE in text):
        text = text.replace("\\n", "\n")  # as exiftool writes it
    lines = text.strip().replace("\r\n", "\n").split("\n")
    at = next((i for i in reversed(range(len(lines))) if lines[i].lstrip().startswith("Steps: ")), None)
    if at is None:
        return None
    fields = _fields(" ".join(lines[at:])[:LONGEST_FIELDS])
    found = ForeignSettings("AUTOMATIC1111")
    prompt, negative = _split(lines[:at])
    motion = _motion_fields(fields.pop("AnimateDiff", ""))
    loras = _hashes(fields.pop("Lora hashes", ""), fields, "lora:")
    prompt = found.without_tags(prompt, loras)
    found.prompts(_keyframes(prompt, found) if motion else prompt, negative)
    _sampler(found, fields)
    if found.values.get("sampling.sampler") == "ddim" and "Eta DDIM" in fields:
        found.number("sampling.eta", fields.pop("Eta DDIM"), "Eta DDIM")
    for label, (option, kind) in NUMBERS.items():
        if label in fields:
            found.number(option, fields.pop(label), label, kind)
    _size(found, fields.pop("Size", ""))
    _second_pass(found, fields)
    _files(found, fields)
    _motion(found, motion)
    for label, value in fields.items():
        if label not in SILENT:
            found.miss(f"{label} {value}")
    return found


def _fields(line: str) -> dict[str, str]:
    """The values of a line by their names; `Hashes`, which is JSON without quotes, is taken out first."""
    fields = {}
    if (start := line.find("Hashes: {")) >= 0:
        try:
            _, end = json.JSONDecoder().raw_decode(line, start + len("Hashes: "))
        except (ValueError, RecursionError):
            pass
        else:
            fields["Hashes"] = line[start + len("Hashes: ") : end]
            line = line[:start] + line[end:].lstrip(", ")
    for name, value in FIELD.findall(line):
        fields[name.strip()] = _unquoted(value.strip())
    return fields


def _unquoted(text: str) -> str:
    try:
        value = json.loads(text) if text[:1] == '"' else text
    except ValueError:
        return text.strip('"')
    return value if isinstance(value, str) else text


def _split(lines: list[str]) -> tuple[str, str]:
    at = next((i for i, line in enumerate(lines) if line.lstrip().startswith(NEGATIVE)), len(lines))
    negative = "\n".join(lines[at:]).strip().removeprefix(NEGATIVE)
    return "\n".join(lines[:at]).strip(), negative.strip()


def _hashes(text: str, fields: dict[str, str], prefix: str) -> dict[str, str]:
    """Name -> digits, of `name: digits, …` and of what `Hashes` says under a prefix."""
    try:
        listed: Any = json.loads(fields.get("Hashes", "{}"))
    except (ValueError, RecursionError):
        listed = {}
    listed = listed if isinstance(listed, dict) else {}
    found = {k.removeprefix(prefix): v for k, v in listed.items() if k.startswith(prefix) and isinstance(v, str)}
    return found | {name.strip(): digits for name, digits in LISTED_HASH.findall(text)}


def _sampler(found: ForeignSettings, fields: dict[str, str]) -> None:
    sampler, schedule = fields.pop("Sampler", ""), fields.pop("Schedule type", "")
    if not sampler:
        return
    base = sampler
    for ending in SCHEDULED:
        if sampler.endswith(f" {ending}"):
            base, schedule = sampler.removesuffix(f" {ending}"), ending
            break
    name = base.lower().replace("++", "pp").replace(" ", "_")
    name = NAMES.get(name, name)
    schedule = schedule.lower().replace(" ", "_")
    if schedule == "automatic":
        schedule = "karras" if name in KARRAS_BY_DEFAULT else ""
    own = {"ddim": "ddim", "pndm": "", "lcm": ""}.get(name, "uniform")
    found.sampling(name, schedule or own, f"sampler {sampler}")


def _size(found: ForeignSettings, text: str) -> None:
    if match := re.fullmatch(r"(\d{1,6})x(\d{1,6})", text):
        for option, value in zip(("size.width", "size.height"), match.groups(), strict=True):
            found.number(option, value, f"Size {text}", int)
    elif text:
        found.miss(f"Size {text}")


def _second_pass(found: ForeignSettings, fields: dict[str, str]) -> None:
    """Hires fix, whose steps are those that are run: ours are those of which the strength is run."""
    if "Hires upscale" not in fields:
        return
    found.number("finish.scale", fields.pop("Hires upscale"), "Hires upscale")
    found.number("finish.strength", fields.pop("Denoising strength", "0.7"), "Denoising strength")
    run, strength = _whole(fields.pop("Hires steps", "0")), found.values.get("finish.strength", 0)
    run = run if run > 0 else found.values.get("sampling.steps", 0)
    if run and strength:
        found.put("finish.steps", max(round(run / strength), 1), "Hires steps")
    upscaler = fields.pop("Hires upscaler", "Lanczos")
    if upscaler.startswith("Latent") and strength:
        found.put("finish.enlarge", "latents", "Hires upscaler")
        if upscaler != "Latent (bicubic)":
            found.miss(f"Hires upscaler {upscaler} (taken: latents, bicubic)")
    elif upscaler != "Lanczos":
        found.miss(f"Hires upscaler {upscaler} (taken: Lanczos; finish.upscaler names a model)")


def _files(found: ForeignSettings, fields: dict[str, str]) -> None:
    """The image model, its VAE and textual inversions; LoRAs are named by the prompt."""
    told = _hashes("", fields, "")
    found.want("model.base", fields.get("Model"), fields.pop("Model hash", told.get("model", "")))
    vae, digits = fields.pop("VAE", ""), fields.pop("VAE hash", told.get("vae", ""))
    if vae not in ("", "None", "Automatic") or digits:
        found.want("model.vae", vae or "the VAE", digits)
    embeddings = _hashes(fields.pop("TI hashes", ""), fields, "embed:")
    for name, digits in embeddings.items():
        found.want("model.embeddings", name, digits)


# ---- sd-webui-animatediff -------------------------------------------------------------------------------------


def _motion_fields(text: str) -> dict[str, str]:
    """What it says of a clip; empty if it was switched off."""
    fields = {name: value.strip() for name, value in ITEM.findall(text)}
    return fields if fields.get("enable", "").lower() == "true" else {}


def _motion(found: ForeignSettings, fields: dict[str, str]) -> None:
    if not fields:
        found.put("size.num_frames", 1, "a picture")
        return
    found.want("model.motion_module", fields.get("model", ""), fields.get("mm_hash", ""))
    frames = fields.get("video_length", "0")
    found.number("size.num_frames", fields.get("batch_size", "16") if frames == "0" else frames, "video_length", int)
    found.number("output.fps", fields.get("fps", "8"), "fps")
    if fields.get("loop_number", "0") != "0":
        found.number("output.loop_count", fields["loop_number"], "loop_number", int)
    window, loop = _whole(fields.get("batch_size", "16")), fields.get("closed_loop", "N")
    if found.values.get("size.num_frames", 0) > window > 0:
        found.put("windows.schedule", "open" if loop == "N" else "uniform", "closed_loop")
        found.put("windows.length", window, "batch_size")
        if (overlap := _whole(fields.get("overlap", "-1"))) >= 0:
            found.put("windows.overlap", overlap, "overlap")
        if loop != "N":
            found.number("windows.stride", fields.get("stride", "1"), "stride", int)
    elif loop == "A":
        found.put("loop.mode", "pingpong", "closed_loop A")
    known = ("enable", "model", "mm_hash", "video_length", "fps", "loop_number", "closed_loop", "batch_size", "stride")
    for name, value in fields.items():
        if name not in (*known, "overlap", "interp_x", "request_id", "format") and (name, value) != ("interp", "Off"):
            found.miss(f"AnimateDiff {name} {value}")


def _whole(text: str) -> int:
    return int(text) if re.fullmatch(r"-?\d{1,6}", text) else -1


def _keyframes(prompt: str, found: ForeignSettings) -> str | dict[int, str]:
    """Lines `0: text` between what all have in common: a prompt that travels."""
    lines = prompt.splitlines()
    places = [i for i, line in enumerate(lines) if KEYFRAME.fullmatch(line)]
    if not places or places != list(range(places[0], places[-1] + 1)):
        return prompt
    for option, part in (("prompts.head_prompt", lines[: places[0]]), ("prompts.tail_prompt", lines[places[-1] + 1 :])):
        if text := "\n".join(part).strip(" ,\n"):
            found.put(option, text, "prompt travel")
    matches = [KEYFRAME.fullmatch(lines[i]) for i in places]
    return {int(match[1]): match[2].strip() for match in matches if match}
