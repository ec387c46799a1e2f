"""Use a trained autoencoder: reconstruct images, measure reconstructions, decode the prior."""
