"""Inference with a trained autoencoder: reconstruction, evaluation, encoding and sampling."""
