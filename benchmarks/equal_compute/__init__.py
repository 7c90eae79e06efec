"""Options that make samples better at equal training FLOPs: latents that are easier to diffuse, self-alignment."""
