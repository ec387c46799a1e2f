"""Faster and more memory-efficient implementations, swapped into the modules of a built model."""
