"""Video autoencoders compared at equal data, rate, parameters and training FLOPs, and DiTs on their latents."""
