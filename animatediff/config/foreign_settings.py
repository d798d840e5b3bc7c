"""What other programs say of how a picture was made, as values of ours; what they mean by their samplers' names."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from animatediff.config.lora_tags import take_tags
from animatediff.config.prompt_warnings import AND, EDITING, HYPERNETWORK
from animatediff.config.spellings import build_request
from animatediff.utils import UserError

LONGEST_REMARK, LONGEST_NAME = 80, 1000  # characters
# Sampler -> (ours, whether it is the same one). k-diffusion's names as ComfyUI spells them.
SAMPLERS: dict[str, tuple[str, bool]] = {
    **{name: (name, True) for name in ("ddim", "euler", "euler_ancestral", "dpmpp_2m", "pndm", "lcm")},
    **dict.fromkeys(("euler_cfg_pp", "heun", "heunpp2", "dpm_2", "dpm_fast", "restart"), ("euler", False)),
    **dict.fromkeys(("dpm_2_ancestral", "dpmpp_2s_ancestral", "dpmpp_sde", "ddpm"), ("euler_ancestral", False)),
    **dict.fromkeys(("euler_ancestral_cfg_pp", "dpmpp_2s_ancestral_cfg_pp"), ("euler_ancestral", False)),
    **dict.fromkeys(("dpmpp_2m_cfg_pp", "dpmpp_2m_sde", "dpmpp_3m_sde", "dpmpp_2m_sde_heun"), ("dpmpp_2m", False)),
    **dict.fromkeys(("dpm_adaptive", "uni_pc", "uni_pc_bh2", "deis", "res_multistep"), ("dpmpp_2m", False)),
    **dict.fromkeys(("lms", "ipndm", "ipndm_v"), ("pndm", False)),
    "ddim_cfg_pp": ("ddim", False),
}
# Scheduler -> (our timestep_spacing, whether it is the same one); "" leaves it to the sampler.
SPACINGS: dict[str, tuple[str, bool]] = {
    **dict.fromkeys(("normal", "uniform"), ("linspace", True)),  # evenly from the last timestep to the first
    **dict.fromkeys(("simple", "sgm_uniform"), ("trailing", True)),
    **dict.fromkeys(("ddim_uniform", "ddim"), ("leading", True)),
    "karras": ("karras", True),
    **dict.fromkeys(("exponential", "polyexponential", "kl_optimal", "align_your_steps"), ("karras", False)),
    **dict.fromkeys(("beta", "linear_quadratic", "turbo"), ("trailing", False)),
}


@dataclass(frozen=True)
class WantedFile:
    """A file of which another program tells a name and perhaps a hash.

    Attributes:
        option: ours that it belongs to, such as `model.base`.
        name: its name, perhaps with folders, perhaps without its ending.
        digits: of one of its hashes (`checkpoints.hashes.Hashes.match`), or "".
        scale: of a LoRA.
    """

    option: str
    name: str
    digits: str = ""
    scale: float | None = None


@dataclass
class ForeignSettings:
    """What another program's settings say in our words.

    Attributes:
        program: its name.
        values: of options, by `group.name`; each alone is one that the option takes.
        wanted: files that are to be found.
        without: what has no counterpart here, in its own words.
    """

    program: str
    values: dict[str, Any] = field(default_factory=dict)
    wanted: list[WantedFile] = field(default_factory=list)
    without: list[str] = field(default_factory=list)

    def put(self, option: str, value: Any, label: str) -> None:
        """Take over a value that the option can hold; another one has no counterpart."""
        try:
            build_request({option: value}, where="", check=False)
        except UserError as error:
            self.miss(f"{label}: {str(error).splitlines()[0].removeprefix(f'{option}: ')}")
        else:
            self.values[option] = value

    def number(self, option: str, value: Any, label: str, kind: type = float) -> None:
        """The same for a number, which may be written as text."""
        try:
            whole = kind is int and isinstance(value, str)
            self.put(option, int(value) if whole else kind(value), label)  # int("7.5") is none, int(7.0) is 7
        except (TypeError, ValueError, OverflowError):
            self.miss(f"{label} {value}")

    def want(self, option: str, name: object, digits: object = "", scale: object = None) -> None:
        """Ask for a file; what cannot be a name, a hash or a scale is left out. An image model is always needed."""
        if not isinstance(name, str) or not name.strip() or "\0" in name or len(name) > LONGEST_NAME:
            if option != "model.base":
                return
            name = "the image model"
        plain = (
            isinstance(digits, str) and 8 <= len(digits) <= 64 and all(c in "0123456789abcdefABCDEF" for c in digits)
        )
        number = float(scale) if isinstance(scale, (int, float)) and abs(scale) < 1000 else None
        self.wanted.append(WantedFile(option, name.strip(), digits.lower() if plain else "", number))  # type: ignore[union-attr]

    def miss(self, what: str) -> None:
        line = " ".join(str(what).split())
        self.without.append(line if len(line) <= LONGEST_REMARK else f"{line[: LONGEST_REMARK - 1]}…")

    def sampling(self, sampler: str, scheduler: str, label: str) -> None:
        """Their sampler and scheduler; of what is not here, the nearest is taken and named."""
        name = sampler.lower().removesuffix("_gpu")
        ours, same = SAMPLERS.get(name, ("", False))
        if not same:
            self.miss(f"{label} (taken: {ours}, the nearest)" if ours else label)
        spacing, exact = SPACINGS.get(scheduler, ("", not scheduler))
        if ours == "lcm":  # its timesteps are those that the model was distilled on
            spacing, exact = "", True
        if not exact:
            self.miss(f"schedule {scheduler} (taken: {spacing}, the nearest)" if spacing else f"schedule {scheduler}")
        if ours:
            self.put("sampling.sampler", ours, label)
        if spacing:
            self.put("sampling.timestep_spacing", spacing, f"schedule {scheduler}")

    def without_tags(self, prompt: str, digits: dict[str, str] | None = None) -> str:
        """A prompt without its LoRA tags; they ask for files, of which `digits` tells hashes by name."""
        try:
            plain, tags = take_tags(prompt)
        except UserError as error:
            self.miss(str(error))
            return prompt
        for tag in tags:
            self.want("model.loras", tag.name, (digits or {}).get(tag.name, ""), tag.scale)
        return plain

    def prompts(self, prompt: str | dict[int, str], negative: str) -> None:
        """Texts with the weights that both programs always read."""
        self.put("prompts.prompt", [prompt], "prompt")
        self.put("prompts.negative_prompt", [negative] if negative else [], "negative prompt")
        self.put("prompts.weighting", True, "weights")
        for text in (*(prompt.values() if isinstance(prompt, dict) else [prompt]), negative):
            if match := EDITING.search(text):
                self.miss(f"prompt editing {match[0]}")
            if match := HYPERNETWORK.search(text):
                self.miss(f"hypernetwork {match[0]}")
            if AND.search(text):
                self.miss("AND between prompts")
