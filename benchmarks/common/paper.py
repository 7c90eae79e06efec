"""The paper's numbers (arXiv 2412.17726), shown next to ours."""

from __future__ import annotations

# Table 1, MCL-JCV, 25 fps, 16 x 224 x 224: latent values in % of the clip's, PSNR, LPIPS, SSIM, FVD.
RECONSTRUCTION = {
    "iVideoGPT": (1.50, 19.353, 0.4677, 0.5752, 1693.10),
    "MAGVIT-v2": (0.65, 24.351, 0.3347, 0.6877, 653.88),
    "CMD": (6.85, 27.332, 0.2732, 0.7746, 468.47),
    "EMU-3": (0.53, 25.359, 0.2543, 0.7260, 353.71),
    "CV-VAE": (0.53, 28.063, 0.2436, 0.7546, 401.92),
    "VidTwin": (0.20, 28.137, 0.2414, 0.8044, 388.86),
}
# Table 2, UCF-101: FVD.
UCF101_FVD = {"TATS": 332, "MAGVIT-v2": 58, "Video-LaViT": 275, "VidTwin": 193}
# UCF-101, FVD that other papers report of their models: name, FVD, protocol (`vidgen.metrics.protocols`), source.
UCF101_FVD_ELSEWHERE = [
    ("TATS", 332, "tats", "TATS, arXiv 2204.03638: class-conditional"),
    ("LARP", 57, "larp", "LARP, arXiv 2410.21264: class-conditional"),
    ("Latte", 478, "latte", "Latte, arXiv 2401.03048: unconditional"),
]
# Table 3: PSNR, SSIM; names as in `autoencoder.presets.ABLATIONS`.
ABLATIONS = {
    "full": (26.116, 0.731),
    "single": (23.512, 0.654),
    "dynamics_qformer": (24.835, 0.693),
    "structure_conv": (25.386, 0.702),
    "structure_hidden": (23.169, 0.630),
}
# Table 4: PSNR, SSIM.
MODEL_SCALING = {"small": (24.83, 0.683), "base": (26.13, 0.732), "large": (27.16, 0.751)}
# Table 6: latent values in % of the clip's, PSNR, LPIPS.
RATE_CURVE = [(0.11, 24.41, 0.35), (0.16, 27.03, 0.28), (0.20, 28.14, 0.24), (0.48, 30.04, 0.15)]

# Figure 5: cost of the baselines, in multiples of VidTwin's: FLOPs and peak memory of a training step at batch size 1.
RESOURCES_CLAIM = {"flops": (4, 8), "memory": (2, 3)}
# The latents of Figure 5 for 16 frames: height and width of the clip, and streams of (channels, sizes), time first.
# A content frame is an image: one frame.
LATENTS = {
    "iVideoGPT": (256, [(64, (2, 16, 16)), (64, (14, 4, 4))]),
    "MAGVIT-v2": (224, [(4, (5, 28, 28))]),
    "CMD": (224, [(3, (1, 224, 224)), (32, (16, 28))]),
    "EMU-3": (224, [(4, (4, 28, 28))]),
    "CV-VAE": (224, [(4, (4, 28, 28))]),
}
