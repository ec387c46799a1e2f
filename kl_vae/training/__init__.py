"""Train an autoencoder: the loop, one step of it, and what makes it resumable."""
