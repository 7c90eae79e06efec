"""Training the autoencoder and the DiT: the shared loop, the two trainings, checkpoints and logs."""
