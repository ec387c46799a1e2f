"""Foundations: device, ranks, files, errors, schema, randomness."""
