"""Muon against what it promises, and its AdamW against torch's."""

import torch
from torch import nn

from kl_vae.muon import Muon, orthogonalize


def test_orthogonalize_brings_singular_values_near_one() -> None:
    torch.manual_seed(0)
    for shape in ((32, 288), (64, 9), (16, 16)):
        matrix = torch.randn(shape)
        update = orthogonalize(matrix)
        values = torch.linalg.svdvals(update)
        assert update.shape == shape
        assert 0.6 < values.min() and values.max() < 1.3
        # the same singular vectors: the product with the input is nearly symmetric positive
        u, _, v = torch.linalg.svd(matrix, full_matrices=False)
        inner = u.T @ update @ v.T
        assert torch.allclose(inner, torch.diag(inner.diagonal()), atol=1e-3)


def test_orthogonalize_of_zero_is_zero() -> None:
    assert orthogonalize(torch.zeros(4, 6)).abs().max() == 0


def test_the_update_is_as_large_for_small_gradients_as_for_large() -> None:
    updates = []
    for scale in (1e-3, 1e3):
        torch.manual_seed(0)
        weight = nn.Parameter(torch.zeros(8, 4, 3, 3))
        weight.grad = scale * torch.randn(weight.shape)
        optimizer = Muon([{"params": [weight], "lr": 0.1, "orthogonalize": True}])
        optimizer.step()
        updates.append(weight.detach().clone())
    assert torch.allclose(*updates, atol=1e-5)
    assert updates[0].norm() > 0.1


def test_two_steps_on_a_kernel_by_hand() -> None:
    """Nesterov momentum, orthogonalised, times sqrt(rows / columns), after the decay."""
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(12, 1, 2, 2))  # the matrix [12, 4]
    expected, momentum = weight.detach().clone(), torch.zeros(12, 1, 2, 2)
    groups = [{"params": [weight], "lr": 0.1, "weight_decay": 0.5, "orthogonalize": True}]
    optimizer = Muon(groups, momentum=0.9)
    for _ in range(2):
        gradient = torch.randn(weight.shape)
        weight.grad = gradient.clone()
        optimizer.step()
        momentum = 0.9 * momentum + 0.1 * gradient
        direction = 0.9 * momentum + 0.1 * gradient
        update = orthogonalize(direction.reshape(12, 4)).reshape(weight.shape)
        expected = expected * (1 - 0.1 * 0.5) - 0.1 * (12 / 4) ** 0.5 * update
    assert torch.allclose(weight, expected, atol=1e-5)


def test_what_is_no_matrix_is_learned_as_by_adamw() -> None:
    torch.manual_seed(0)
    ours, theirs = (nn.Parameter(torch.ones(5)) for _ in range(2))
    settings = {"betas": (0.9, 0.99), "eps": 1e-6}
    muon = Muon([{"params": [ours], "lr": 0.01, "weight_decay": 0.1}], **settings)
    adamw = torch.optim.AdamW([theirs], lr=0.01, weight_decay=0.1, **settings)
    for _ in range(5):
        gradient = torch.randn(5)
        for parameter, optimizer in ((ours, muon), (theirs, adamw)):
            parameter.grad = gradient.clone()
            optimizer.step()
    assert torch.allclose(ours, theirs, atol=1e-6)


def test_it_goes_on_from_its_state_dict_bit_for_bit() -> None:
    def build() -> tuple[nn.Sequential, Muon]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Conv2d(4, 2, 3))
        matrices = [p for p in model.parameters() if p.ndim > 1]
        others = [p for p in model.parameters() if p.ndim == 1]
        groups = [
            {"params": matrices, "lr": 0.02, "orthogonalize": True},
            {"params": others, "lr": 1e-3},
        ]
        return model, Muon(groups)

    def step(model: nn.Sequential, optimizer: Muon, seed: int) -> None:
        torch.manual_seed(seed)
        optimizer.zero_grad()
        model(torch.randn(1, 2, 8, 8)).square().mean().backward()
        optimizer.step()

    whole, whole_optimizer = build()
    for seed in range(4):
        step(whole, whole_optimizer, seed)
    first, first_optimizer = build()
    for seed in range(2):
        step(first, first_optimizer, seed)
    second, second_optimizer = build()
    second.load_state_dict(first.state_dict())
    second_optimizer.load_state_dict(first_optimizer.state_dict())
    for seed in range(2, 4):
        step(second, second_optimizer, seed)
    for a, b in zip(whole.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
