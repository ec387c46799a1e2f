"""Measure autoencoders on a data set."""
