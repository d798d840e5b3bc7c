"""The whole UNet compiled by torch.compile, with the number of compilations bounded and told."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import torch
from animatediff_kernels import calibration
from torch import Tensor, nn

Tell = Callable[[str], None]
NO_LIMIT = {"cache_size_limit": 10_000, "accumulated_cache_size_limit": 10_000}  # of all that a process compiles
MOST_GRAPHS = 8  # shapes and LoRA scales that are compiled for one network


@dataclass
class CompiledUNet:
    """What `compile_unet` put in place of a UNet's `forward`, and what came of it.

    Attributes:
        whole: the compiled `forward`. plain: what it was.
        graphs: compilations so far, one per shape of the inputs and set of constants, such as LoRA scales.
        seconds: that they took. failure: why the network runs uncompiled from now on, or None.
        steered: whether it was called while something reached into it.
    """

    unet: nn.Module
    most_graphs: int
    cuda_graphs: bool
    tell: Tell
    plain: Callable[..., Tensor]
    whole: Callable[..., Tensor]
    graphs: int = 0
    seconds: float = 0.0
    failure: str | None = None
    steered: bool = False
    met: set[Any] = field(default_factory=set)  # shapes that have been run once, so that their kernels are known

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        if self.failure is not None or self.is_steered() or self._is_new_on_gpu(args, kwargs):
            return self.plain(*args, **kwargs)
        if self.cuda_graphs:
            torch.compiler.cudagraph_mark_step_begin()
        same = [x.contiguous() if isinstance(x, Tensor) else x for x in args]  # windows are views of a clip
        try:
            with torch._dynamo.config.patch(NO_LIMIT):
                out = self.whole(*same, **kwargs)
        except torch._dynamo.exc.TorchDynamoException as error:
            out = self.plain(*args, **kwargs)  # raises what was the caller's mistake and not the compiler's
            self.fall_back(_first_line(error))
            return out
        return out.clone() if self.cuda_graphs else out

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., Tensor]:
        """A copy of the network runs uncompiled: what was compiled is of this one."""
        copied = memo[id(self.unet)]
        return MethodType(type(copied).forward, copied)

    def undo(self) -> None:
        """Run the network as it was."""
        self.unet.__dict__.pop("forward", None)

    def is_steered(self) -> bool:
        """Whether something reaches into the network now, which a graph made without it would not notice."""
        found = any(m._forward_hooks or m._forward_pre_hooks or getattr(m, "image_prompts", None)
                    for m in self.unet.modules())  # fmt: skip
        if found and not self.steered:
            self.steered = True
            self.tell(
                "the UNet runs uncompiled while something reaches into it: an IP-Adapter, FreeU, PAG, motion_scale, "
                "a camera, offload=blocks or another hook"
            )
        return found

    def fall_back(self, reason: str) -> None:
        self.failure = reason
        self.tell(f"the UNet runs uncompiled: {reason}")

    def compiler(self, backend: str | Callable[..., Any]) -> Callable[..., Any]:
        """A backend that counts its calls, and compiles nothing once it failed or reached the bound."""
        # of inductor's compile_fx
        options = {"config_patches": {"triton.cudagraphs": True}} if self.cuda_graphs else {}
        compiler = torch._dynamo.lookup_backend(backend)

        def compile_graph(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
            if self.failure is None and self.graphs >= self.most_graphs:
                self.fall_back(f"{self.graphs} shapes or LoRA scales were compiled, the most that is allowed")
            if self.failure is not None:
                return graph.forward
            start = time.perf_counter()
            try:
                compiled = compiler(graph, inputs, **options)
            except (RuntimeError, OSError) as error:  # a compiler that is not there, or cannot do it
                self.fall_back(_first_line(error))
                return graph.forward
            seconds = time.perf_counter() - start
            self.graphs, self.seconds = self.graphs + 1, self.seconds + seconds
            self.tell(f"compiled the UNet in {seconds:.0f} s ({self.graphs} of {self.most_graphs})")
            return compiled

        return compile_graph

    def _is_new_on_gpu(self, args: tuple, kwargs: dict[str, Any]) -> bool:
        tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
        if not any(x.is_cuda for x in tensors):
            return False
        calibration.load(str(tensors[0].device))
        shapes = tuple((*x.shape, x.dtype, x.requires_grad) for x in tensors)
        new = shapes not in self.met
        self.met.add(shapes)
        return new


def compile_unet(
    unet: nn.Module,
    *,
    most_graphs: int = MOST_GRAPHS,
    cuda_graphs: bool = False,
    backend: str | Callable[..., Any] = "inductor",
    tell: Tell = print,
) -> CompiledUNet:
    """Let torch.compile take the whole UNet, once for every shape of its inputs (dynamic=False).

    The network stays the same module; parameters, merged LoRAs and LoRA layers are read as they are at each call. A
    LoRA whose scale changes is compiled again, as a new shape is. After `most_graphs` compilations, or where there is
    no compiler, the network runs uncompiled, and so it does while forward hooks or an IP-Adapter reach into it; each is
    told in one line. On a GPU the first call with new shapes runs uncompiled, which lets the kernels be timed
    (`animatediff_kernels.calibration`).

    Args:
        unet: where it is compiled already, it is so anew.
        most_graphs: at least 1.
        cuda_graphs: replay kernels as CUDA graphs; the output is copied, since a replay writes over the last one.
        backend: of torch.compile.
    Returns: the record, whose `undo()` takes it back.
    """
    if isinstance(unet.forward, CompiledUNet):
        unet.forward.undo()
    plain = unet.forward
    record = CompiledUNet(unet, most_graphs, cuda_graphs, tell, plain, plain)
    record.whole = torch.compile(plain, dynamic=False, fullgraph=True, backend=record.compiler(backend))
    unet.forward = record
    return record


def _first_line(error: BaseException) -> str:
    error = getattr(error, "inner_exception", error)  # what dynamo or inductor wraps
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
