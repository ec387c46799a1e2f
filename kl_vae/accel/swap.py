"""Whether a module may be computed by other code than its own forward.

A class of `kl_vae.accel` is given to a finished module (`module.__class__ = ...`). What happens to
the module afterwards is not in its class: hooks, another `forward` on the instance (as the library
accelerate sets it to move weights between devices), parametrizations, changed attributes, weights
elsewhere. So every such class asks here on each call, and runs the plain class's code otherwise.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook


def is_own(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether `module`, of which `forward` runs, is still of the class `kind` that it was given.

    A parametrization makes it a subclass, and a forward of the instance may move its weights.
    """
    return type(module) is kind and "forward" not in vars(module)


def is_untouched(module: nn.Module, *kinds: type[nn.Module]) -> bool:
    """Whether `module` need not be called: it is of one of these very classes, and nothing more.

    Hooks, of the module or global ones, would not be called, and may change what they see.
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
    """Whether what runs is compiled, exported, traced or transformed: only plain code can be."""
    return (
        torch.compiler.is_compiling()  # or exporting
        or torch.jit.is_tracing()  # type: ignore[attr-defined,no-untyped-call]
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )


def is_exporting() -> bool:
    """Whether a graph is exported, whose sizes may be left open: none may be branched on."""
    found: bool = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)()
    return found


def are_on(device: torch.device, *tensors: Tensor | None) -> bool:
    """Whether these are torch's own tensors on `device`, not on meta and no subclass; None is."""
    return all(
        x is None or (type(x) in (Tensor, nn.Parameter) and x.device == device) for x in tensors
    )


def are_float32_on_cpu(*tensors: Tensor | None) -> bool:
    """Whether these are torch's own tensors in float32 on the CPU, to be computed with as such."""
    return (
        not is_traced()
        and not torch.is_autocast_enabled("cpu")
        and are_on(torch.device("cpu"), *tensors)
        and all(x is None or x.dtype == torch.float32 for x in tensors)
    )
