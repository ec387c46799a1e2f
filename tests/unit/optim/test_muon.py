"""Muon against what it promises, and its AdamW against torch's."""

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from kl_vae.optim import muon
from kl_vae.optim.muon import Muon, assign, exchange, orthogonalize

SHAPES = ((8, 4, 3, 3), (8, 4, 3, 3), (12, 1, 2, 2), (36, 8), (8, 36), (8, 4, 3, 3), (5, 5))


def directly(matrix: Tensor) -> Tensor:
    """Newton and Schulz's quintic as published, of one matrix, in float64."""
    x = matrix.double().T if matrix.shape[0] > matrix.shape[1] else matrix.double()
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x - 4.7750 * gram @ x + 2.0315 * gram @ gram @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


def with_singular_values(values: Tensor, rows: int, columns: int) -> Tensor:
    """A random matrix [rows, columns]."""
    u, _ = torch.linalg.qr(torch.randn(rows, len(values), dtype=torch.float64))
    v, _ = torch.linalg.qr(torch.randn(columns, len(values), dtype=torch.float64))
    return (u * values.double() @ v.T).float()


def take_steps(optimizer: Muon, number: int = 3, seed: int = 0) -> None:
    """Steps with random gradients, the same in each call."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(number):
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = torch.randn(p.shape, generator=generator).to(p)
        optimizer.step()


def matrices() -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(shape)) for shape in SHAPES]


@pytest.mark.parametrize("shape", [(32, 288), (64, 9), (16, 16)])
def test_orthogonalize_brings_singular_values_near_one(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    stack = torch.randn(3, *shape)
    for matrix, update in zip(stack, orthogonalize(stack), strict=True):
        assert update.shape == shape
        values = torch.linalg.svdvals(update)
        assert 0.67 < values.min() and values.max() < 1.21
        # the same singular vectors: the product with the input is nearly diagonal
        u, _, v = torch.linalg.svd(matrix, full_matrices=False)
        inner = u.T @ update @ v.T
        assert torch.allclose(inner, torch.diag(inner.diagonal()), atol=1e-3)


def test_all_but_tiny_singular_values_come_to_lie_in_the_stated_range() -> None:
    torch.manual_seed(0)
    values = torch.logspace(0, -2.5, 200)
    values = torch.cat((values[values > values.norm() / 600], torch.zeros(20)))
    update = orthogonalize(with_singular_values(values, 240, 260)[None])[0]
    found = torch.linalg.svdvals(update.double())
    assert 0.67 < found[: (values > 0).sum()].min() and found.max() < 1.21
    assert found[(values > 0).sum() :].max() < 1e-3


@pytest.mark.parametrize(
    "values",
    [
        torch.ones(48),
        torch.logspace(0, -4, 48),
        torch.logspace(0, -8, 48),
        torch.cat((torch.ones(1), torch.full((47,), 1e-4))),
        torch.cat((torch.ones(1), torch.full((47,), 1e-2))),
        torch.ones(1),
        torch.ones(12),
    ],
    ids=["equal", "to 1e-4", "to 1e-8", "one large", "one larger", "rank 1", "rank 12"],
)
@pytest.mark.parametrize("shape", [(48, 432), (432, 48), (48, 48)])
def test_it_is_the_published_iteration(values: Tensor, shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    matrix = with_singular_values(values, *shape)
    expected = directly(matrix)
    error = torch.linalg.matrix_norm(orthogonalize(matrix[None])[0].double() - expected, 2)
    assert error < 1e-4


def test_orthogonalize_of_zero_is_zero() -> None:
    assert orthogonalize(torch.zeros(2, 4, 6)).abs().max() == 0


def test_one_zero_matrix_does_not_change_the_others_of_its_stack() -> None:
    torch.manual_seed(0)
    stack = torch.stack((torch.randn(4, 6), torch.zeros(4, 6), torch.randn(4, 6)))
    update = orthogonalize(stack)
    assert update[1].abs().max() == 0
    for i in (0, 2):
        torch.testing.assert_close(update[i].double(), directly(stack[i]), atol=1e-5, rtol=0.0)


def test_autocast_changes_nothing() -> None:
    torch.manual_seed(0)
    stack = torch.randn(2, 8, 20)
    expected = orthogonalize(stack)
    with torch.autocast("cpu", torch.bfloat16):
        update = orthogonalize(stack)
    assert update.dtype == torch.float32
    assert torch.equal(update, expected)


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


def test_steps_of_many_kernels_by_hand() -> None:
    """Nesterov momentum, orthogonalised, times sqrt(rows / columns), after the decay."""
    weights = matrices()
    expected = [p.detach().clone() for p in weights]
    momenta = [torch.zeros_like(p) for p in weights]
    groups = [{"params": weights, "lr": 0.1, "weight_decay": 0.5, "orthogonalize": True}]
    optimizer = Muon(groups, momentum=0.9)
    for _ in range(2):
        for i, weight in enumerate(weights):
            gradient = torch.randn(weight.shape)
            weight.grad = gradient.clone()
            momenta[i] = 0.9 * momenta[i] + 0.1 * gradient
            direction = 0.9 * momenta[i] + 0.1 * gradient
            rows, columns = weight.flatten(1).shape
            update = directly(direction.flatten(1)).reshape(weight.shape).float()
            scale = max(1.0, rows / columns) ** 0.5
            expected[i] = expected[i] * (1 - 0.1 * 0.5) - 0.1 * scale * update
        optimizer.step()
    for weight, value in zip(weights, expected, strict=True):
        torch.testing.assert_close(weight.detach(), value, atol=1e-5, rtol=0.0)


@pytest.mark.parametrize("values", [1, 600, 2**24])
def test_the_size_of_a_stack_does_not_change_the_update(
    monkeypatch: pytest.MonkeyPatch, values: int
) -> None:
    alone, together = matrices(), matrices()
    take_steps(Muon([{"params": [p], "lr": 0.1, "orthogonalize": True} for p in alone]))
    monkeypatch.setattr(muon, "STACK_VALUES", values)
    take_steps(Muon([{"params": together, "lr": 0.1, "orthogonalize": True}]))
    for a, b in zip(alone, together, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0.0)


def test_a_stack_is_of_one_matrix_shape_and_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(muon, "STACK_VALUES", 600)  # two kernels of [8, 36]
    parameters = matrices()
    (stacks,) = assign(parameters, 1)
    assert {id(p) for stack in stacks for p in stack} == {id(p) for p in parameters}
    shapes = [[tuple(p.flatten(1).shape) for p in stack] for stack in stacks]
    expected = [[(8, 36)] * 2, [(8, 36)] * 2, [(36, 8)], [(12, 4)], [(5, 5)]]
    assert sorted(shapes) == sorted(expected)
    monkeypatch.setattr(muon, "STACK_VALUES", 1)
    assert [len(stack) for stack in assign(parameters, 1)[0]] == [1] * len(parameters)


def test_other_devices_take_all_matrices_of_a_shape_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(muon, "STACK_VALUES", 1)
    parameters = [nn.Parameter(p.to("meta")) for p in matrices()]
    (stacks,) = assign(parameters, 1)
    assert sorted(map(len, stacks)) == [1, 1, 1, 4]


def multiplications(rows: int, columns: int) -> int:
    """Count those of `orthogonalize`."""
    with FakeTensorMode(), FlopCounterMode(display=False) as counter:
        orthogonalize(torch.empty(1, rows, columns))
    return counter.get_total_flops() // 2


@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 8, 64])
def test_each_matrix_is_one_ranks_work_and_the_loads_are_even(world_size: int) -> None:
    shapes = [(512, 512, 3, 3)] * 30 + [(256, 256, 3, 3)] * 11 + [(128, 128, 3, 3)] * 10
    shapes += [(512, 512, 1, 1)] * 8 + [(256, 512, 3, 3), (128, 3, 3, 3), (3, 128, 3, 3)]
    parameters = [nn.Parameter(torch.empty(shape, device="meta")) for shape in shapes]
    shares = assign(parameters, world_size)
    assert len(shares) == world_size
    assigned = [id(p) for share in shares for stack in share for p in stack]
    assert sorted(assigned) == sorted(id(p) for p in parameters)
    costs = {shape: multiplications(shape[0], math.prod(shape[1:])) for shape in set(shapes)}
    loads = [sum(costs[tuple(p.shape)] for stack in x for p in stack) for x in shares]  # type: ignore[index]
    mean = sum(loads) / world_size
    assert max(loads) <= max(1.1 * mean, costs[512, 512, 3, 3])  # a matrix is not divided
    again = assign(parameters, world_size)
    assert [list(map(len, share)) for share in again] == [list(map(len, x)) for x in shares]


@pytest.mark.parametrize("world_size", [2, 3, 64])
def test_ranks_exchange_each_value_once(world_size: int) -> None:
    parameters = matrices()
    shares = assign(parameters, world_size)
    updates = [torch.ones(len(x), *x[0].flatten(1).shape) for x in shares[0]]
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    try:
        with Operations() as operations:
            received = list(exchange(updates, shares, 0))
    finally:
        dist.destroy_process_group()
    stacks = [stack for share in shares for stack in share]
    assert [len(x) for x in received] == [len(stack) for stack in stacks]
    assert all(
        x.shape[1:] == stack[0].flatten(1).shape for x, stack in zip(received, stacks, strict=True)
    )
    assert all(torch.equal(x, own) for x, own in zip(received, updates, strict=False))
    sent = [x for x in operations.collectives if x.numel()]
    assert {x.dtype for x in sent} == {torch.float32}
    assert sum(x.numel() for x in sent) == sum(p.numel() for p in parameters)


def test_more_ranks_than_matrices_leave_some_without_work() -> None:
    weight = nn.Parameter(torch.zeros(4, 4))
    assert [len(share) for share in assign([weight], 3)] == [1, 0, 0]


def test_the_memory_format_changes_nothing() -> None:
    ours, theirs = matrices()[:3], matrices()[:3]
    for p in theirs:
        p.data = p.data.to(memory_format=torch.channels_last)
    for parameters in (ours, theirs):
        take_steps(Muon([{"params": parameters, "lr": 0.1, "orthogonalize": True}]))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.detach(), b.detach(), atol=1e-6, rtol=0.0)


def test_half_precision_weights_are_updated_in_their_own_type() -> None:
    exact, rounded = matrices(), [nn.Parameter(p.detach().bfloat16()) for p in matrices()]
    for parameters in (exact, rounded):
        take_steps(Muon([{"params": parameters, "lr": 0.1, "orthogonalize": True}]))
    for a, b in zip(exact, rounded, strict=True):
        assert b.dtype == torch.bfloat16
        assert (a - b.float()).abs().max() < 0.1


def test_a_parameter_without_gradient_is_left_alone() -> None:
    for orthogonalized in (True, False):
        with_gradient, without = nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(2, 3))
        groups = [{"params": [without, with_gradient], "lr": 0.1, "weight_decay": 0.1}]
        optimizer = Muon([{**groups[0], "orthogonalize": orthogonalized}])
        optimizer.step()
        assert not optimizer.state
        with_gradient.grad = torch.ones(2, 3)
        optimizer.step()
        assert torch.equal(without, torch.ones(2, 3))
        assert list(optimizer.state) == [with_gradient]
        assert (with_gradient < 0.99).all()


def test_a_gradient_of_zero_only_decays() -> None:
    weight, bias = nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(3))
    weight.grad, bias.grad = torch.zeros(2, 3), torch.zeros(3)
    Muon(
        [
            {"params": [weight], "lr": 0.1, "weight_decay": 0.5, "orthogonalize": True},
            {"params": [bias], "lr": 0.1, "weight_decay": 0.5},
        ]
    ).step()
    for p in (weight, bias):
        assert torch.equal(p, torch.full_like(p, 0.95))


def test_a_closure_is_evaluated_with_gradients() -> None:
    weight = nn.Parameter(torch.ones(2, 2))
    optimizer = Muon([{"params": [weight], "lr": 0.1, "orthogonalize": True}])

    def closure() -> float:
        optimizer.zero_grad()
        loss = weight.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.item()

    assert optimizer.step(closure) == 4.0
    assert weight.norm() < 2.0
    assert optimizer.step() is None


def test_what_is_no_matrix_is_learned_as_by_adamw() -> None:
    torch.manual_seed(0)
    ours, theirs = ([nn.Parameter(torch.ones(n)) for n in (5, 1, 3)] for _ in range(2))
    settings: dict[str, Any] = {"betas": (0.9, 0.99), "eps": 1e-6}
    muon = Muon([{"params": ours, "lr": 0.01, "weight_decay": 0.1}], **settings)
    adamw = torch.optim.AdamW(theirs, lr=0.01, weight_decay=0.1, **settings)
    for step in range(5):
        for i in range(3):
            # the second begins later, so that its bias correction is another
            gradient = None if i == 1 and step < 2 else torch.randn(ours[i].shape)
            ours[i].grad = gradient
            theirs[i].grad = None if gradient is None else gradient.clone()
        muon.step()
        adamw.step()
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, atol=1e-6)


class Operations(TorchDispatchMode):
    """Collects the names of all operations, and the tensors of collectives."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.collectives: list[Tensor] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.names.add(func.overloadpacket.__name__)
        if func.namespace == "c10d":
            self.collectives += args[0]
        return func(*args, **(kwargs or {}))


def test_a_step_never_waits_for_a_value() -> None:
    """No .item(), bool(tensor) or copy to another device, which would hold the host up."""
    others = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(()))]
    groups = [{"params": matrices(), "lr": 0.1, "orthogonalize": True}]
    optimizer = Muon([*groups, {"params": others, "lr": 0.1, "weight_decay": 0.1}])
    take_steps(optimizer, 1)
    with Operations() as operations:
        optimizer.step()
    assert {"bmm", "_foreach_lerp_", "_foreach_addcdiv_"} <= operations.names
    waiting = {"_local_scalar_dense", "item", "is_nonzero", "nonzero", "equal", "_to_copy"}
    assert not operations.names & waiting


def test_it_goes_on_from_its_state_dict_bit_for_bit(tmp_path: Any) -> None:
    def build() -> tuple[nn.Sequential, Muon]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 2, 3))
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
    torch.save(first_optimizer.state_dict(), tmp_path / "optimizer.pt")
    second, second_optimizer = build()
    second.load_state_dict(first.state_dict())
    second_optimizer.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    for seed in range(2, 4):
        step(second, second_optimizer, seed)
    for a, b in zip(whole.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
    keys = {frozenset(state) for state in second_optimizer.state.values()}
    assert keys == {frozenset({"momentum"}), frozenset({"step", "mean", "square"})}
