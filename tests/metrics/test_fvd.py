"""The Fréchet distance on Gaussians with known answers, and its extractors."""

import pytest
import torch
from torch import Tensor, nn

from animatediff.metrics.fvd import TorchScriptFeatures, frechet_distance
from animatediff.utils import UserError


def sample(count: int, covariance: Tensor, mean: Tensor, *, seed: int = 0) -> Tensor:
    """Features that have exactly this mean and covariance."""
    d = len(mean)
    noise = torch.randn(count, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    white = torch.linalg.qr(noise - noise.mean(dim=0)).Q * (count - 1) ** 0.5
    return white @ torch.linalg.cholesky(covariance).T + mean


@pytest.mark.parametrize("count", [9, 500])  # fewer rows than the two sets' features together, and many
def test_known_gaussians(count):
    a, b = torch.tensor([1.0, 4.0, 9.0, 16.0]).double(), torch.tensor([4.0, 4.0, 1.0, 25.0]).double()
    mean = torch.arange(4).double()
    x, y = sample(count, a.diag(), mean), sample(count, b.diag(), mean + 2, seed=1)
    expected = 16 + (a.sqrt() - b.sqrt()).square().sum()
    assert frechet_distance(x, y) == pytest.approx(float(expected), rel=1e-9)
    assert frechet_distance(y, x) == pytest.approx(float(expected), rel=1e-9)


def test_covariances_that_do_not_commute():
    """For two by two, tr (AB)^½ is the root of tr AB + 2 (det AB)^½."""
    a = torch.tensor([[2.0, 1.0], [1.0, 3.0]]).double()
    b = torch.tensor([[5.0, -2.0], [-2.0, 1.0]]).double()
    x, y = sample(50, a, torch.zeros(2).double()), sample(30, b, torch.zeros(2).double(), seed=1)
    overlap = ((a @ b).trace() + 2 * (a @ b).det().sqrt()).sqrt()
    assert frechet_distance(x, y) == pytest.approx(float(a.trace() + b.trace() - 2 * overlap), rel=1e-9)


def test_fewer_clips_than_features():
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-5)
    assert frechet_distance(x, x + 0.5) == pytest.approx(64 * 0.25, rel=1e-5)
    centred = x - x.mean(dim=0)
    assert frechet_distance(centred, 3 * centred) == pytest.approx(4 * float(centred.square().sum()) / 4, rel=1e-5)


def test_what_is_no_set_of_features():
    x = torch.randn(4, 3)
    with pytest.raises(UserError, match=r"shape \(1, 3\), expected \(n, d\) of at least two clips"):
        frechet_distance(x, x[:1])
    with pytest.raises(UserError, match="got 3 and 2 features, expected those of one extractor"):
        frechet_distance(x, x[:, :2])
    with pytest.raises(UserError, match="not finite"):
        frechet_distance(x, x / 0)


class Detector(nn.Module):
    """As I3D in TorchScript: tells which flags it was given, and its first and last pixel values."""

    def forward(self, x: Tensor, rescale: bool = False, resize: bool = False, return_features: bool = False) -> Tensor:
        assert x.shape[2] >= 3, "too few frames"
        flags = torch.tensor([float(rescale), float(resize), float(return_features)]).expand(len(x), 3)
        return torch.cat([flags, x[:, 0, 0, 0, :1], x[:, 0, -1, 0, :1]], dim=1)


class Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=[2, 3, 4]) if x.shape[2] > 1 else x


def test_torchscript_files(tmp_path):
    torch.jit.script(Detector()).save(tmp_path / "i3d.pt")
    torch.jit.script(Mean()).save(tmp_path / "mean.pt")
    clips = torch.tensor([-1.0, 0.2, 1.0])[None, :, None, None, None].expand(2, 3, 3, 8, 8)
    assert TorchScriptFeatures(tmp_path / "i3d.pt")(clips).tolist() == [[1, 1, 1, 0, 255]] * 2
    plain = TorchScriptFeatures(tmp_path / "mean.pt")
    assert plain(clips).flatten().tolist() == pytest.approx([0.2 / 3] * 6)
    with pytest.raises(UserError, match=r"got \(2, 3, 1, 8, 8\) from .*mean\.pt.*, expected features \(2, d\)"):
        plain(clips[:, :1])
    with pytest.raises(UserError, match=r"i3d\.pt .* refused clips of shape \(2, 1, 3, 8, 8\) \(.*too few frames"):
        TorchScriptFeatures(tmp_path / "i3d.pt")(clips[:, :1])
    torch.save({"weight": torch.zeros(2)}, tmp_path / "weights.pt")
    with pytest.raises(UserError, match=r"weights\.pt, which is no TorchScript file"):
        TorchScriptFeatures(tmp_path / "weights.pt")
    with pytest.raises(UserError, match=r"nowhere\.pt, which is no file"):
        TorchScriptFeatures(tmp_path / "nowhere.pt")
