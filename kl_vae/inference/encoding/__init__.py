"""Encode a data set, and measure its latents."""
