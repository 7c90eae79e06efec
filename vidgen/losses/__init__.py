"""Training losses: reconstruction losses of the VAE and the denoising loss of the DiT.

Both are modules whose forward takes a batch and returns the loss with its terms, so that DDP, FSDP and mixed precision
wrap one call per step.
"""

import torch

Losses = dict[str, torch.Tensor]  # scalars by name, the total under "loss"
