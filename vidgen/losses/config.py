"""Config keys of the training losses."""

from __future__ import annotations

from dataclasses import dataclass

from ..common.config import PathConfig, key


@dataclass
class VAELossConfig:
    """Weights of the VAE's reconstruction and KL losses (`vidgen.losses.vae.VAELoss`)."""

    l1_weight: float = key(1.0, "weight of the mean absolute error per value")
    l2_weight: float = key(0.0, "weight of the mean squared error per value")
    kl_weight: float = key(1e-3, "weight of the KL divergence, in nats per value of the clip")


@dataclass
class PerceptualConfig(PathConfig):
    """LPIPS between frames, on ImageNet features."""

    weight: float = key(0.05, "weight of LPIPS; the default is the paper's, 0 disables it")
    backbone: str = key("vgg", "ImageNet network; the paper's is vgg", choices=("vgg", "alex", "squeeze"))
    weights: str | None = key(None, "file with the backbone's weights; by default that of torch hub's cache")
    weights_sha256: str | None = key(None, "SHA-256 of that file, if it is not torchvision's")
    chunk_size: int = key(16, "frames compared at a time: fewer need less memory", minimum=1)


@dataclass
class GANConfig:
    """The discriminator, trained with the VAE from `start_step` on."""

    weight: float = key(0.05, "weight of the GAN loss; the default is the paper's, 0 disables it")
    loss: str = key("hinge", "GAN loss; the paper's is hinge", choices=("hinge", "non_saturating"))
    discriminator: str = key("2d", "2d judges frames, 3d judges clips", choices=("2d", "3d"))
    channels: int = key(64, "channels of the discriminator's first layer", minimum=1)
    num_layers: int = key(
        3, "downsampling layers of the discriminator; 3d also halves the number of frames", minimum=1
    )
    adaptive: bool = key(
        True, "scale the weight by the ratio of the reconstruction's to the GAN's gradient at the last layer"
    )
    start_step: int = key(20_000, "step at which the GAN loss is enabled", minimum=0)
    warmup_steps: int = key(0, "optimizer steps over which its weight then grows to its full value", minimum=0)
    lecam_weight: float = key(0.0, "weight of the LeCAM regularization of the discriminator; 0 disables it")
    lr_scale: float = key(1.0, "the discriminator's learning rate divided by the VAE's")


@dataclass
class DiffusionConfig:
    """The prediction target of the DiT, its timesteps, and how validation samples are drawn."""

    prediction_type: str = key(
        "sample",
        "what the DiT predicts: sample (x0, the paper's) or the names of Diffusers",
        choices=("sample", "epsilon", "v_prediction", "flow_prediction"),
    )
    noise_schedule: str | None = key(
        None,
        "by default squaredcos_cap_v2, and linear for epsilon; flow_prediction has its own",
        choices=("linear", "scaled_linear", "squaredcos_cap_v2"),
    )
    zero_terminal_snr: bool | None = key(None, "end the schedule in pure noise; by default on, except for epsilon")
    loss_weighting: str = key("none", "weight of a timestep's loss", choices=("none", "min_snr"))
    min_snr_gamma: float = key(5.0, "signal-to-noise ratio at which min_snr clips the weight")
    timestep_sampling: str = key("uniform", "distribution of training timesteps", choices=("uniform", "logit_normal"))
    logit_mean: float = key(0.0, "mean of logit_normal; above 0 samples more noise")
    logit_std: float = key(1.0, "standard deviation of logit_normal")
    independent_timesteps: float = key(
        0.0, "fraction of clips whose two streams get different timesteps; the others share one"
    )
    class_dropout: float = key(0.2, "fraction of clips trained without their class, for classifier-free guidance")
    subclass_dropout: float = key(0.0, "fraction of clips trained with their class's superclass: jump for jump/dog")
    guidance_scale: float = key(5.0, "classifier-free guidance of validation samples; without classes there is none")
    num_inference_steps: int = key(50, "denoising steps of validation samples", minimum=1)
