"""Checkpoints: reading and writing weights, presets, the Hugging Face Hub, and run files."""
