"""Guidance beyond the plain formula: parts of the batch in their order, factors, rescaling."""

import pytest
import torch

from animatediff.diffusion.guidance import classifier_free_guidance, guide, rescale

X, T = torch.randn(2, 3, 1, 2, 2, generator=torch.Generator().manual_seed(0)), torch.tensor([5, 5])


def parts_of(*values):
    """A denoiser whose parts predict multiples of x."""

    def denoise(x, t):
        assert len(x) == len(t) == len(values) * len(X)
        return torch.cat([value * part for value, part in zip(values, x.chunk(len(values)), strict=True)])

    return denoise


def test_perturbed_attention_guidance():
    alone = classifier_free_guidance(parts_of(2.0, 0.5), 1.0, perturbed_scale=3.0)
    assert torch.allclose(alone(X, T), (2 + 3 * 1.5) * X)
    both = classifier_free_guidance(parts_of(1.0, 2.0, 0.5), 7.0, perturbed_scale=3.0)
    assert torch.allclose(both(X, T), (1 + 7 * 1 + 3 * 1.5) * X)


def test_factor():
    """It may differ from frame to frame; 1 is plain guidance."""
    denoise = parts_of(1.0, 2.0)
    per_frame = torch.tensor([1.0, 0.5, 0.0])[:, None, None, None]
    out = classifier_free_guidance(denoise, 4.0, factor=lambda x, t: per_frame)(X, T)
    assert torch.allclose(out, guide(X, 2 * X, 4 * per_frame))
    plain = classifier_free_guidance(denoise, 4.0)(X, T)
    assert torch.equal(classifier_free_guidance(denoise, 4.0, factor=lambda x, t: torch.ones(1))(X, T), plain)


@pytest.mark.parametrize("share", [0.0, 0.7, 1.0])
def test_rescale(share):
    """The spread of every clip is between its own and the conditional one's."""
    guided, conditional = 3 * torch.randn(2, 5, 4, 8, 8), torch.randn(2, 5, 4, 8, 8)
    own, wanted = (x.flatten(1).std(1) for x in (guided, conditional))
    out = rescale(guided, conditional, share)
    assert torch.allclose(out.flatten(1).std(1), share * wanted + (1 - share) * own)
    assert torch.allclose(out / guided, (out / guided)[:, :1, :1, :1, :1].expand_as(out), atol=1e-5)


def test_rescale_in_guidance():
    out = classifier_free_guidance(parts_of(1.0, 2.0), 5.0, rescaled=1.0)(X, T)
    assert torch.allclose(out, 2 * X, atol=1e-5)
