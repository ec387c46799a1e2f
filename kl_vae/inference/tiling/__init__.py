"""Encoding and decoding of images that are too large to be processed as a whole."""

from kl_vae.inference.tiling.modes import Mode, Tiling, check_tiling, decode_tiled, encode_tiled

__all__ = ["Mode", "Tiling", "check_tiling", "decode_tiled", "encode_tiled"]
