"""Operations of torch that a simulated GPU needs in Python, for want of cuDNN and NVRTC.

They check devices and dtypes, and return tensors of the right shape whose values are arbitrary.

Shapes: B batch, C channels, H and W height and width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("aten", "IMPL")  # the replacements last as long as this does


def install() -> None:
    """Replace the operations in this process."""
    torch.backends.cuda.enable_cudnn_sdp(False)
    for name, function in (
        ("convolution", _convolution),
        ("convolution_backward", _convolution_backward),
        ("cudnn_batch_norm", _batch_norm),
        ("cudnn_batch_norm_backward", _batch_norm_backward),
        ("exp2", torch.empty_like),
    ):
        _LIBRARY.impl(name, function, "CUDA")


def _convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> Tensor:
    """Return an empty output of a two-dimensional convolution."""
    assert not transposed
    for other in (weight, bias):
        assert other is None or (other.device, other.dtype) == (x.device, x.dtype)
    sides = [
        (x.shape[i + 2] + 2 * _at(padding, i) - _at(dilation, i) * (weight.shape[i + 2] - 1) - 1)
        // _at(stride, i)
        + 1
        for i in range(2)
    ]
    return _empty((x.shape[0], weight.shape[0], *sides), x)


def _convolution_backward(
    gradient: Tensor,
    x: Tensor,
    weight: Tensor,
    bias_sizes: Sequence[int] | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    wanted: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return empty gradients of a convolution's input, weight and bias."""
    for other in (x, weight):
        assert (other.device, other.dtype) == (gradient.device, gradient.dtype)
    bias_shape = (weight.shape[0],)
    return (
        _empty(x.shape, x) if wanted[0] else None,
        _empty(weight.shape, weight) if wanted[1] else None,
        gradient.new_empty(bias_shape) if wanted[2] else None,
    )


def _batch_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mean: Tensor | None,
    variance: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the output, the batch's mean and inverse deviation, and a reserve."""
    statistics = torch.empty(2, x.shape[1], device=x.device)
    reserve = torch.empty(0, dtype=torch.uint8, device=x.device)
    return torch.empty_like(x), statistics[0], statistics[1], reserve


def _batch_norm_backward(
    x: Tensor,
    gradient: Tensor,
    weight: Tensor,
    mean: Tensor | None,
    variance: Tensor | None,
    batch_mean: Tensor | None,
    batch_deviation: Tensor | None,
    eps: float,
    reserve: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return empty gradients of the input, the weight and the bias."""
    return torch.empty_like(x), torch.empty_like(weight), torch.empty_like(weight)


def _empty(shape: Sequence[int], like: Tensor) -> Tensor:
    """Return an empty tensor [B, C, H, W] in the memory format of another."""
    is_last = like.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if is_last else torch.contiguous_format
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=layout)


def _at(values: Sequence[int], i: int) -> int:
    return values[i] if len(values) > 1 else values[0]
