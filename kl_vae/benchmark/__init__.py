"""Measure on this machine what a choice costs: of a training step, of an optimiser."""
