"""Residual block that uses less memory, fused on CPUs in float32 without gradients.

The Winograd convolution processes a few rows of its input at a time. In the fused block, norm and
SiLU are applied to these rows, and the shortcut is added to the output rows, while they are in the
cache. Only three feature maps exist: the input, the output of the first convolution, and the
output.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kl_vae.accel import checkpointing
from kl_vae.accel.convolution import WinogradConv2d, is_3_by_3, suits
from kl_vae.accel.group_norm import NORMS, scale_and_shift
from kl_vae.accel.swap import are_float32_on_cpu, is_own, is_traced, is_untouched
from kl_vae.accel.winograd import winograd_convolve
from kl_vae.blocks import ResnetBlock


class FastResnetBlock(ResnetBlock):
    """`ResnetBlock` that is fused or checkpointed where possible, and otherwise runs plain code.

    `activation_checkpointing` selects the activations that the backward pass recomputes, one of
    `checkpointing.ACTIVATION_CHECKPOINTING`; None: autograd stores all activations.
    """

    activation_checkpointing: str | None = None

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        if not is_own(self, FastResnetBlock):
            return super().forward(x, context)
        if self.activation_checkpointing != "blocks" or not torch.is_grad_enabled():
            return self._forward(x, context)
        if is_traced() and not torch.compiler.is_compiling():
            return super().forward(x, context)
        # the RNG state matters only for dropout
        out: Tensor = checkpoint(
            self._forward, x, context, use_reentrant=False, preserve_rng_state=self._drops()
        )
        return out

    def _forward(self, x: Tensor, context: Tensor | None) -> Tensor:
        if is_traced():
            return super().forward(x, context)
        if self._is_fused(x):
            return self._fused(x)
        kind = self.activation_checkpointing
        h = activated_conv(x, self.norm1, self.conv1, kind)
        if self.has_context:
            assert context is not None, "AutoEncoderKL checks the context"
            h = h + self.temb_proj(F.silu(context))[:, :, None, None]
        shortcut = self.nin_shortcut(x) if self.has_shortcut else x
        if not self._drops():
            return activated_conv(h, self.norm2, self.conv2, kind, shortcut)
        out: Tensor = shortcut + self.conv2(self.dropout(activate(h, self.norm2, kind)))
        return out

    def _drops(self) -> bool:
        """Return whether the dropout must be called: it is active, or was replaced or modified."""
        dropout = self.dropout
        return not is_untouched(dropout, nn.Dropout) or (dropout.training and dropout.p > 0.0)

    def _is_fused(self, x: Tensor) -> bool:
        convs, norms = (self.conv1, self.conv2), (self.norm1, self.norm2)
        return (
            not torch.is_grad_enabled()
            and not self.has_context
            and not self._drops()
            and all(is_untouched(conv, WinogradConv2d) and is_3_by_3(conv) for conv in convs)
            and all(is_untouched(norm, *NORMS) for norm in norms)
            and are_float32_on_cpu(*self.norm1.parameters(), *self.norm2.parameters())
            and suits(self.conv1, x)
            and suits(self.conv2, x)
        )

    def _fused(self, x: Tensor) -> Tensor:
        h = winograd_convolve(
            x,
            self.conv1.weight,
            self.conv1.bias,
            activation=scale_and_shift(self.norm1, x),  # type: ignore[arg-type]
        )
        return winograd_convolve(
            h,
            self.conv2.weight,
            self.conv2.bias,
            activation=scale_and_shift(self.norm2, h),  # type: ignore[arg-type]
            residual=self.nin_shortcut(x) if self.has_shortcut else x,
            overwrite=self.has_shortcut,
        )


def activated_conv(
    x: Tensor,
    norm: nn.Module,
    conv: nn.Module,
    activation_checkpointing: str | None,
    residual: Tensor | None = None,
) -> Tensor:
    """Compute conv(silu(norm(x))) + residual, storing only x for backward if so configured."""
    if (
        activation_checkpointing in ("norms", "blocks")
        and checkpointing.takes_norm(norm, x)
        and checkpointing.takes_conv(conv, x)
    ):
        return checkpointing.norm_silu_conv(x, norm, conv, residual)
    out: Tensor = conv(activate(x, norm, activation_checkpointing))
    return out if residual is None else residual + out


def activate(x: Tensor, norm: nn.Module, activation_checkpointing: str | None) -> Tensor:
    """Compute silu(norm(x)), [B, C, H, W], without modifying x.

    With activation checkpointing, only x is stored for the backward pass. Without gradients, SiLU
    runs in place on the output of an unmodified group norm; other norms may return their input,
    and hooks may keep the output.
    """
    if activation_checkpointing is not None and checkpointing.takes_norm(norm, x):
        return checkpointing.norm_silu(x, norm)
    h: Tensor = norm(x)
    in_place = not torch.is_grad_enabled() and not is_traced() and is_untouched(norm, *NORMS)
    return F.silu(h, inplace=in_place)
