"""Weights in any layout: reading, writing, presets, the hub, and a run's own files."""
