"""SiLU after a norm, in the norm's own memory where no gradient is kept."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kl_vae.accel.hooks import has_hooks


def norm_silu(x: Tensor, norm: nn.Module) -> Tensor:
    """silu(norm(x)), [B, C, H, W]; x stays as it is.

    Only what a group norm gives is known to be nobody else's: a norm of another kind may return its
    input, and a hook may keep what it sees.
    """
    h: Tensor = norm(x)
    own = isinstance(norm, nn.GroupNorm) and not has_hooks(norm)
    return F.silu(h, inplace=own and not torch.is_grad_enabled())
