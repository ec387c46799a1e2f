"""Optimisers, their configuration and the learning-rate schedule."""
