"""Encode and decode images that are too large for the memory as a whole."""

from kl_vae.inference.tiling.modes import Mode, Tiling, check_tiling, decode_tiled, encode_tiled

__all__ = ["Mode", "Tiling", "check_tiling", "decode_tiled", "encode_tiled"]
