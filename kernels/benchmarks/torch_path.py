"""What the CPU's own paths are worth: each against the way without it, in turns in one process.

python kernels/benchmarks/torch_path.py --threads 1

Layers of a guided step of 16 frames at 256x256 in float32, both ways with the allocator setting of our command line;
times are CPU time per thread, the least of `--repeat`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from animatediff_kernels import attention, temporal_attention, use_backend
from animatediff_kernels.cpu import fast_products
from animatediff_kernels.cpu_convolutions import conv2d, upsampled_conv3x3
from ops import OPS
from run import RESULTS, device_label, provenance, time_once, write_rows
from step import fill
from torch import Tensor

from animatediff.config.networks import VAEConfig
from animatediff.models.attention import Attention, FeedForward
from animatediff.models.layers import ResnetBlock
from animatediff.models.vae import VAE
from animatediff.utils import keep_freed_memory

LEVELS = {320: 32, 640: 16, 1280: 8}  # width -> side of the feature map
IMAGES, FRAMES, HEADS = 32, 16, 8
KEY = ("path", "width", "side", "device", "threads")
COLUMNS = (*KEY, "old_ms", "new_ms", "ratio", "error", "versions", "commit", "date")
Case = tuple[str, int, int, Callable[[], Tensor], Callable[[], Tensor]]


def cases() -> Iterator[Case]:
    """Name, width, side of the map that goes in, the old way and the new one."""
    for width, side in LEVELS.items():
        sizes = {"clips": IMAGES // FRAMES, "frames": FRAMES, "tokens": side * side}
        copied = OPS["temporal_attention"].plain(sizes | {"heads": HEADS, "head_dim": width // HEADS})
        tokens = torch.randn(IMAGES, side * side, width)
        qkv = torch.randn(3, IMAGES, side * side, width)
        new = lambda qkv=qkv: temporal_attention(*qkv, frames=FRAMES, num_heads=HEADS)  # noqa: E731
        yield "temporal attention of clips", width, side, lambda f=copied, qkv=qkv: f(*qkv), new
        layer = FeedForward(width)
        yield "feed-forward in rows", width, side, lambda f=layer, x=tokens: whole(f, x), lambda f=layer, x=tokens: f(x)
        a, b, c = torch.randn(3, width, width) / width
        old = lambda x=tokens, w=(a, b, c): [F.linear(x, part) for part in w][0]  # noqa: E731
        joint = torch.cat([a, b, c])
        new = lambda x=tokens, w=joint: F.linear(x, w)[..., : x.shape[-1]]  # noqa: E731
        yield "packed projection (not used)", width, side, old, new
    for width, side in ((640, 16), (1280, 8), (1280, 4)):
        x, w, b = torch.randn(IMAGES, width, side, side), torch.randn(width, width, 3, 3) / width, torch.randn(width)
        last = x.to(memory_format=torch.channels_last)
        old = lambda x=x, w=w, b=b: F.conv2d(F.interpolate(x, scale_factor=2), w, b, padding=1)  # noqa: E731
        yield "upsampling", width, side, old, lambda x=last, w=w, b=b: within(upsampled_conv3x3, x, w, b)
    for into, width, side in ((320, 320, 32), (960, 320, 32), (640, 640, 16), (1280, 1280, 8), (1280, 1280, 4)):
        block = fill(ResnetBlock(into, width, groups=32, eps=1e-5, time_channels=1280))
        x, time = torch.randn(IMAGES, into, side, side), torch.randn(2, 1280)
        last = x.to(memory_format=torch.channels_last)
        new = lambda f=block, x=last, t=time: within(f, x, t)  # noqa: E731
        yield f"ResNet block of {into}", width, side, lambda f=block, x=x, t=time: without(f, x, t), new
    for side in (8, 4):
        x, w, b = torch.randn(IMAGES, 1280, side, side), torch.randn(1280, 1280, 3, 3) / 1280, torch.randn(1280)
        last = x.to(memory_format=torch.channels_last)
        old = lambda x=last, w=w, b=b: within(F.conv2d, x, w, b, stride=2, padding=1)  # noqa: E731
        new = lambda x=last, w=w, b=b: within(conv2d, x, w, b, stride=2, padding=1)  # noqa: E731
        yield "convolution of stride 2 to few pixels", 1280, side, old, new
    for width, side in LEVELS.items():
        layer, x = Attention(width, HEADS).bfloat16(), torch.randn(IMAGES, side * side, width).bfloat16()
        q, k, v = layer.to_q(x), layer.to_k(x), layer.to_v(x)
        old = lambda qkv=(q, k, v): attention(*qkv, num_heads=HEADS)  # noqa: E731
        yield "attention of bfloat16 in float32", width, side, old, lambda f=layer, qkv=(q, k, v): f._attend(*qkv)
    with torch.device("meta"):
        vae = VAE(VAEConfig())
    vae = fill(vae.to_empty(device="cpu")).eval()
    latents = torch.randn(1, 4, 32, 32)
    yield "VAE decodes one frame", 512, 32, lambda: without(vae.decode, latents), lambda: vae.decode(latents)


def without(way: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """Without Winograd and oneDNN's products."""
    with use_backend("torch"):
        return way(*inputs)


def within(way: Callable[..., Tensor], *inputs: Tensor, **options: int) -> Tensor:
    """As in a network of Stable Diffusion's width, which chooses the library of its products."""
    with fast_products(inputs[0], inputs[0].new_empty(320, 1)):
        return way(*inputs, **options)


def whole(layer: FeedForward, x: Tensor) -> Tensor:
    """All rows at once, and a new tensor for the gated values."""
    value, gate = layer.net[0].proj(x).chunk(2, dim=-1)
    return layer.net[2](value * F.gelu(gate))


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--path", default="", help="only those whose name has this in it")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    for path, width, side, old, new in cases():
        if args.path not in path:
            continue
        exact = old()
        error = ((new() - exact).norm() / exact.norm()).item()
        times = [[time_once(way) for way in (old, new)] for _ in range(args.repeat)]
        before, after = (min(column) for column in zip(*times, strict=True))
        row = {"path": path, "width": str(width), "side": str(side), "device": device_label("cpu")}
        row |= {"old_ms": f"{before:.4g}", "new_ms": f"{after:.4g}", "error": f"{error:.1e}"}
        row["ratio"] = f"{before / after:.2f}" if error < 1e-5 else ""
        print(" ".join(row.values()), flush=True)
        write_rows(RESULTS / "torch_path.csv", [row | provenance()], KEY, COLUMNS)


if __name__ == "__main__":
    main()
