"""Checks whether other code may replace the forward of a module.

The classes of `kl_vae.accel` are assigned to existing modules (`module.__class__ = ...`). Later
changes to a module are not visible in its class: hooks, an instance attribute `forward` (which the
accelerate library sets to move weights between devices), parametrizations, changed attributes,
moved weights. Each class therefore runs these checks on every call, and falls back to the plain
code if one fails.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook


def is_own(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Return whether `module`, whose `forward` is running, is still exactly of class `kind`.

    A parametrization changes the class, and an instance attribute `forward` may move weights.
    """
    return type(module) is kind and "forward" not in vars(module)


def is_untouched(module: nn.Module, *kinds: type[nn.Module]) -> bool:
    """Return whether `module` is exactly of one of these classes, without hooks or overrides.

    Only then may its call be skipped: hooks of the module, or global ones, would not run.
    """
    return (
        type(module) in kinds
        and "forward" not in vars(module)
        and module._compiled_call_impl is None
        and not module._forward_hooks
        and not module._forward_pre_hooks
        and not module._backward_hooks
        and not module._backward_pre_hooks
        and not _has_any_global_hook()  # type: ignore[no-untyped-call]
    )


def is_traced() -> bool:
    """Return whether the code is being compiled, exported, traced or transformed."""
    return (
        torch.compiler.is_compiling()  # or exporting
        or torch.jit.is_tracing()  # type: ignore[attr-defined,no-untyped-call]
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )


def is_exporting() -> bool:
    """Return whether a graph is exported, so that code must not branch on sizes."""
    found: bool = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)()
    return found


def are_on(device: torch.device, *tensors: Tensor | None) -> bool:
    """Return whether all tensors are plain tensors or parameters on `device`; None is allowed."""
    return all(
        x is None or (type(x) in (Tensor, nn.Parameter) and x.device == device) for x in tensors
    )


def are_float32_on_cpu(*tensors: Tensor | None) -> bool:
    """Return whether all tensors are plain float32 CPU tensors, without tracing or autocast."""
    return (
        not is_traced()
        and not torch.is_autocast_enabled("cpu")
        and are_on(torch.device("cpu"), *tensors)
        and all(x is None or x.dtype == torch.float32 for x in tensors)
    )
