"""Reconstruct a data set: pictures, figures, a gallery."""
