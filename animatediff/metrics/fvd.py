"""Fréchet video distance (Unterthiner et al. 2019, arXiv 1812.01717) over the features of any extractor.

The distance of two Gaussians that have the means and covariances of two sets of feature vectors. It is only comparable
within one extractor and one number of clips: it comes out too large, and the more so the fewer clips there are.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from animatediff.checkpoints.files import file_sha256
from animatediff.metrics.clip_metrics import Encoder, encode_frames
from animatediff.utils import UserError

I3D_FLAGS = ("rescale", "resize", "return_features")  # of the TorchScript I3D that StyleGAN-V's authors published

Extractor = Callable[[Tensor], Tensor]  # clips (n, f, 3, H, W) in [-1, 1] -> features (n, d)


@torch.no_grad()
def frechet_distance(a: Tensor, b: Tensor) -> float:
    """|mean a - mean b|² + tr(A + B - 2 (A B)^½) of features (n, d) and (m, d) with the covariances A and B.

    With centred features X and Y, A = XᵀX and B = YᵀY, the eigenvalues of A B are the squared singular values of X Yᵀ.
    So tr (A B)^½ is their sum: no matrix square root, nothing to regularise, and never an imaginary part, also with
    fewer clips than features.

    Raises:
        UserError: fewer than two rows, unequal widths, or values that are not finite.
    """
    for features in (a, b):
        if features.ndim != 2 or len(features) < 2:
            raise UserError(f"got features of shape {tuple(features.shape)}, expected (n, d) of at least two clips")
        if not bool(features.isfinite().all()):
            raise UserError("got features that are not finite, expected numbers: check the extractor")
    if a.shape[1] != b.shape[1]:
        raise UserError(f"got {a.shape[1]} and {b.shape[1]} features, expected those of one extractor")
    a, b = a.double(), b.double()
    x, y = _factor(a), _factor(b)
    variances = x.square().sum() + y.square().sum()
    overlap = torch.linalg.svdvals(x @ y.T).sum()
    distance = (a.mean(dim=0) - b.mean(dim=0)).square().sum() + variances - 2 * overlap
    return max(float(distance), 0.0)


def _factor(features: Tensor) -> Tensor:
    """X with XᵀX the unbiased covariance of features (n, d), of at most d rows."""
    centred = (features - features.mean(dim=0)) / (len(features) - 1) ** 0.5
    return torch.linalg.qr(centred, mode="r").R if len(centred) > centred.shape[1] else centred


class EncoderFeatures:
    """Features (n, 3 d) of clips from an image encoder: the mean of the frames' embeddings, the last minus the first,
    and the mean absolute difference of neighbours. What is seen, where it goes, how it gets there."""

    def __init__(self, encoder: Encoder):
        self.encoder = encoder
        self.name = f"frames and changes of {encoder.name}"

    def __call__(self, videos: Tensor) -> Tensor:
        """Raises: UserError for clips of one frame."""
        if videos.shape[1] < 2:
            raise UserError(f"got a clip of {videos.shape[1]} frame, expected at least two: one has no changes")
        z = torch.stack([encode_frames(self.encoder, video) for video in videos])
        return torch.cat([z.mean(dim=1), z[:, -1] - z[:, 0], z.diff(dim=1).abs().mean(dim=1)], dim=1)


class TorchScriptFeatures:
    """Features from a local TorchScript file, such as the I3D with which FVD is usually reported.

    The file is a program: loading it runs it, so take it only from where you would take code. It is called with
    clips (n, 3, f, H, W) in [-1, 1]; where its `forward` has StyleGAN-V's flags `rescale`, `resize` and
    `return_features`, they are set, and pixels are in [0, 255]: it then scales and resizes by itself, as in their FVD.

    Raises:
        UserError: the file is missing or no TorchScript.
    """

    def __init__(self, path: str | Path, *, device: torch.device | None = None):
        path, self.device = Path(path), device or torch.device("cpu")
        if not path.is_file():
            raise UserError(f"got {path}, which is no file: give a TorchScript file, such as I3D's")
        try:
            self.module = torch.jit.load(str(path), map_location=self.device).eval()
        except (RuntimeError, ValueError) as error:
            raise UserError(
                f"got {path}, which is no TorchScript file ({str(error).splitlines()[0]}), expected what "
                "torch.jit.save writes: weights alone do not say how features are computed"
            ) from None
        arguments = {argument.name for argument in self.module.forward.schema.arguments}
        self.flags = {flag: True for flag in I3D_FLAGS if flag in arguments}
        self.name = f"{path} (sha256 {file_sha256(path)[:16]})"

    @torch.no_grad()
    def __call__(self, videos: Tensor) -> Tensor:
        """Raises: UserError where the program fails, or gives something else than (n, d)."""
        pixels = (videos + 1) * 127.5 if "rescale" in self.flags else videos
        try:
            features = self.module(pixels.transpose(1, 2).contiguous().to(self.device), **self.flags)
        except (RuntimeError, torch.jit.Error) as error:
            reason = str(error).strip().splitlines()[-1]
            raise UserError(
                f"{self.name} refused clips of shape {tuple(videos.shape)} ({reason}): I3D needs about ten frames"
            ) from None
        if not isinstance(features, Tensor) or features.shape[:1] != videos.shape[:1] or features.ndim != 2:
            got = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise UserError(f"got {got} from {self.name}, expected features ({len(videos)}, d)")
        return features.float().cpu()
