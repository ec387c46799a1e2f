"""Covariances from few samples."""

from __future__ import annotations

import pytest
import torch
from kl_vae.inference.sampling.shrinkage import ledoit_wolf, symmetric_root


def test_shrinkage_is_that_of_the_paper() -> None:
    x = torch.randn(7, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = (x - x.mean(0)) * torch.tensor([1.0, 2.0, 0.5, 3.0, 1.0], dtype=torch.float64)
    # section 3.3, with ||A||^2 = tr(A A^T) / p
    empirical = sum(torch.outer(row, row) for row in x) / 7
    m = empirical.trace() / 5
    d2 = (empirical - m * torch.eye(5)).square().sum() / 5
    b2 = sum((torch.outer(row, row) - empirical).square().sum() / 5 for row in x) / 7**2
    share = (min(b2, d2) / d2).item()
    assert 0.05 < share < 0.95
    shrunk = ledoit_wolf(x)
    assert shrunk.shrinkage == pytest.approx(share)
    expected = share * m * torch.eye(5, dtype=torch.float64) + (1 - share) * empirical
    torch.testing.assert_close(shrunk.covariance, expected)


def test_few_samples_are_shrunk_more_and_samples_alike_wholly() -> None:
    x = torch.randn(500, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x[:, 1] = x[:, 0] * 3.0
    few, many = x[:8] - x[:8].mean(0), x - x.mean(0)
    assert ledoit_wolf(many).shrinkage < 0.05 < ledoit_wolf(few).shrinkage
    # fewer samples than dimensions, and yet an inverse
    assert torch.linalg.eigvalsh(ledoit_wolf(few[:4]).covariance).min() > 0
    same = ledoit_wolf(torch.zeros(3, 2, dtype=torch.float64))
    assert same.shrinkage == 1.0
    assert not same.covariance.any()


def test_the_root_of_a_singular_matrix() -> None:
    x = torch.tensor([[4.0, 2.0], [2.0, 1.0]], dtype=torch.float64)
    root = symmetric_root(x)
    torch.testing.assert_close(root @ root, x)
    torch.testing.assert_close(root, root.T)
