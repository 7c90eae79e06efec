"""Video data: listing and splits, clip datasets, video files and streams, shards, sprites, and the latent cache."""
