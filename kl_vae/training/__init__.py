"""Train an autoencoder: the loop, its step, and resumable state."""
