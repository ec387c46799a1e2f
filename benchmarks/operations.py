"""Floating point operations of kl_vae's plain modules, and the rates that this machine reaches.

Counted are convolutions and matrix products, two operations per multiply-add. Counting computes
nothing: any size takes no time and no memory.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from common import (
    DTYPES,
    Architecture,
    alternate,
    argument_parser,
    parse,
    random_images,
    random_latents,
    report,
)
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from kl_vae import accelerate

DIRECT, UP, DOWN, OTHER = "3 x 3, stride 1", "upsampling", "downsampling", "1 x 1 and attention"
COLUMNS = {"": "{work}", "image": "{size} x {size}", "GFLOP": "{gflop:.1f}"}
COLUMNS |= {kind: "{shares[" + kind + "]:.1%}" for kind in (DIRECT, UP, DOWN, OTHER)}


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Count and report; return the rows."""
    parser = argument_parser(__doc__, repeats=5)
    parser.add_argument("--sizes", nargs="+", type=int, default=[128, 256, 512, 1024])
    parser.add_argument("--precision", choices=DTYPES, default="fp32", help="of the product")
    parser.add_argument("--product", type=int, default=2048, help="side of the matrices")
    args = parse(parser, argv)
    architecture = Architecture.of(args.config)
    rows = []
    for work in ("encode", "decode", "step"):
        for size in args.sizes:
            counts = operations_of(work, architecture, size)
            total = counts.total()
            shares = {kind: counts[kind] / total for kind in (DIRECT, UP, DOWN, OTHER)}
            rows.append({"work": work, "size": size, "gflop": total / 1e9, "shares": shares})
    notes = [measure_rates(args)]
    heading = f"Operations of {args.config} for one image; a step is forward and backward"
    report(args, heading, COLUMNS, rows, notes)
    return rows


def operations_of(work: str, architecture: Architecture, size: int) -> Counter[str]:
    """Count the operations of one image of size x size pixels, by kind.

    Those of a backward pass through upsampling count as 3 x 3 convolutions.
    """
    plain = accelerate(
        architecture.build(), channels_last=False, winograd=False, merge_upsampling=False
    )
    plain.set_activation_checkpointing(None)
    with FakeTensorMode() as mode:
        tensors = (*plain.parameters(), *plain.buffers())
        model = copy.deepcopy(plain, {id(x): mode.from_tensor(x) for x in tensors})
        images, latents = random_images(model, 1, size), random_latents(model, 1, size)
        with count_operations(model) as counts, torch.set_grad_enabled(work == "step"):
            if work == "encode":
                model.encode(images)
            elif work == "decode":
                model.decode(latents)
            else:
                reconstruction, posterior = model(images, noise=latents)
                (reconstruction.mean() + posterior.kl().mean()).backward()
    return counts


@contextmanager
def count_operations(*models: nn.Module) -> Iterator[Counter[str]]:
    """Count the operations within the block by kind; those of `upsample` in `models` apart."""
    counter = _Counter()
    handles = []
    for model in models:
        for name, module in model.named_modules():
            if name.endswith(".upsample"):
                handles.append(module.register_forward_pre_hook(counter.enter))
                handles.append(module.register_forward_hook(counter.leave))
    try:
        # attention as two products, which every version of torch counts alike
        with counter, sdpa_kernel(SDPBackend.MATH):
            yield counter.counts
    finally:
        for handle in handles:
            handle.remove()


class _Counter(TorchDispatchMode):
    """Adds up torch's formulas. Its FlopCounterMode cannot take a gradient at an input."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self._upsampling = False

    def enter(self, *_: object) -> None:
        self._upsampling = True

    def leave(self, *_: object) -> None:
        self._upsampling = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.counts[self._kind(func, args)] += formula(*args, **(kwargs or {}), out_val=result)
        return result

    def _kind(self, func: Any, args: tuple[Any, ...]) -> str:
        if "convolution" not in str(func):
            return OTHER
        if self._upsampling:
            return UP
        backward = "backward" in str(func)
        weight, stride = (args[2], args[4]) if backward else (args[1], args[3])
        if weight.shape[-1] == 1:
            return OTHER
        return DOWN if max(stride) > 1 else DIRECT


def measure_rates(args: Any) -> str:
    """Time a square matrix product and a copy; return a line with their rates."""
    shape, dtype = (args.product, args.product), DTYPES[args.precision]
    a, b = (torch.randn(shape, device=args.device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    source = torch.ones(2**28, dtype=torch.uint8, device=args.device)
    target = torch.empty_like(source)
    calls = {"product": lambda: torch.mm(a, b, out=out), "copy": lambda: target.copy_(source)}
    timings = alternate(calls, args.repeats, args.device)
    rate = 2 * args.product**3 / timings["product"].median / 1e9
    moved = 2 * source.numel() / timings["copy"].median / 1e9
    return (
        f"A product of {args.product} x {args.product} matrices in {args.precision} runs at "
        f"{rate:.0f} GFLOP/s; a copy reads and writes {moved:.1f} GB/s."
    )


if __name__ == "__main__":
    main()
