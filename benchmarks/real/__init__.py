"""A pipeline of real video on held-out clips: reconstruction, its two latents, gestures, image-to-video, copies."""
