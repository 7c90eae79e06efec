"""Training of the VAE and the DiT."""
