"""Config keys of the training losses."""

from __future__ import annotations

from dataclasses import dataclass

from ..common.config import PathConfig, key


@dataclass
class VAELossConfig:
    """Weights of the VAE's losses (`vidgen.losses.vae.VAELoss`), and regularization of its latents."""

    l1_weight: float = key(1.0, "weight of the mean absolute error per value")
    l2_weight: float = key(0.0, "weight of the mean squared error per value")
    kl_weight: float = key(1e-3, "weight of the KL divergence, in nats per value of the clip")
    equivariance: float = key(
        0.0,
        "fraction of clips that are reduced in size, and decoded from their latent reduced alike (scale equivariance)",
        minimum=0,
        maximum=1,
    )
    equivariance_max_factor: int = key(
        2, "largest factor by which these clips are reduced along height and along width", minimum=2
    )
    nested_dropout: float = key(
        0.0,
        "fraction of clips that are decoded from the first channels of each stream, a random number of them",
        minimum=0,
        maximum=1,
    )


@dataclass
class PerceptualConfig(PathConfig):
    """LPIPS between frames, on ImageNet features."""

    weight: float = key(0.05, "weight of LPIPS; the default is the paper's, 0 disables it")
    backbone: str = key("vgg", "ImageNet network; the paper uses vgg", choices=("vgg", "alex", "squeeze"))
    weights: str | None = key(None, "file with the backbone's weights; by default the one in torch hub's cache")
    weights_sha256: str | None = key(None, "SHA-256 of that file, if it is not torchvision's")
    num_frames: int | None = key(None, "frames of each clip that are compared, drawn at random; null: all", minimum=1)
    chunk_size: int = key(16, "frames compared at a time; fewer need less memory", minimum=1)


@dataclass
class GANConfig(PathConfig):
    """The discriminator, trained with the VAE from `start_step` on."""

    weight: float = key(0.05, "weight of the GAN loss; the default is the paper's, 0 disables it")
    pretrained: str | None = key(
        None, "start the discriminator from that of another run: its folder, a checkpoint or a .safetensors file"
    )
    loss: str = key("hinge", "GAN loss; the paper uses hinge", choices=("hinge", "non_saturating"))
    discriminator: str = key("2d", "2d classifies frames, 3d classifies clips", choices=("2d", "3d"))
    channels: int = key(64, "channels of the discriminator's first layer", minimum=1)
    num_layers: int = key(
        3, "downsampling layers of the discriminator; 3d also halves the number of frames", minimum=1
    )
    adaptive: bool = key(
        True, "multiply the weight by the ratio of the reconstruction's to the GAN's gradient norm at the last layer"
    )
    start_step: int = key(20_000, "step at which the GAN loss is enabled", minimum=0)
    warmup_steps: int = key(0, "optimizer steps over which its weight then grows to the full value", minimum=0)
    lecam_weight: float = key(0.0, "weight of the discriminator's LeCAM regularization; 0 disables it")
    lr_scale: float = key(1.0, "ratio of the discriminator's learning rate to the VAE's", minimum=0)


@dataclass
class DiffusionConfig:
    """The prediction target of the DiT, its timesteps, and how validation samples are drawn."""

    prediction_type: str | None = key(
        None,
        "prediction target of the DiT, by Diffusers' names; by default that of model.pretrained, otherwise sample "
        "(x0, the paper's)",
        choices=("sample", "epsilon", "v_prediction", "flow_prediction"),
    )
    noise_schedule: str | None = key(
        None,
        "by default that of model.pretrained, otherwise squaredcos_cap_v2, for epsilon linear; flow_prediction has a "
        "fixed schedule",
        choices=("linear", "scaled_linear", "squaredcos_cap_v2"),
    )
    zero_terminal_snr: bool | None = key(
        None, "end the schedule in pure noise; by default as model.pretrained, otherwise enabled except for epsilon"
    )
    loss_weighting: str = key("none", "weight of a timestep's loss", choices=("none", "min_snr"))
    min_snr_gamma: float = key(5.0, "signal-to-noise ratio at which min_snr clips the weight", above=0)
    timestep_sampling: str = key("uniform", "distribution of training timesteps", choices=("uniform", "logit_normal"))
    logit_mean: float = key(0.0, "mean of logit_normal; above 0 samples more noise")
    logit_std: float = key(1.0, "standard deviation of logit_normal", above=0)
    independent_timesteps: float = key(
        0.0,
        "fraction of clips whose two streams have different timesteps; the others share one",
        minimum=0,
        maximum=1,
    )
    self_alignment: float = key(
        0.0,
        "weight of the alignment of an earlier block's tokens with those of a later block (LayerSync; its authors use "
        "0.2); 0 disables it",
        minimum=0,
    )
    self_alignment_layers: list[int] = key(  # noqa: RUF009
        list, "numbers of these two blocks, from 1, such as [2, 4]; by default at 2/7 and 4/7 of the depth"
    )
    frame_timesteps: float = key(
        0.0,
        "fraction of clips whose dynamics frames have different timesteps, half of them after clean or noisy first "
        "frames, for roll-outs with history",
        minimum=0,
        maximum=1,
    )
    class_dropout: float = key(
        0.2, "fraction of clips trained without a class, for classifier-free guidance", minimum=0, maximum=1
    )
    subclass_dropout: float = key(
        0.0, "fraction of clips trained with the superclass of their class: jump for jump/dog", minimum=0, maximum=1
    )
    image_dropout: float = key(
        0.5, "fraction of clips trained without the first frame, with image conditioning", minimum=0, maximum=1
    )
    shortcut: float = key(
        0.0,
        "fraction of clips that train steps of any length, for sampling in few steps by a DiT with "
        "model.overrides.interval_conditioning=true",
        minimum=0,
        maximum=1,
    )
    shortcut_guidance: float = key(
        1.0, "classifier-free guidance that such steps include; ignored without classes", minimum=0
    )
    shortcut_teacher: bool = key(
        False,
        "learn this guided velocity from a frozen copy of the model at the start, such as that of model.pretrained, "
        "instead of the moving average",
    )
    shortcut_base: float = key(
        1 / 32,
        "interval, as a fraction of the schedule, up to which such steps are learned from the guided velocity; longer "
        "ones are learned from two steps of half the interval. 1 distills guidance only",
        minimum=1 / 32,
        maximum=1,
    )
    shortcut_ema_decay: float = key(
        0.99, "decay of the moving average of the model that such steps are learned from", minimum=0, maximum=1
    )
    guidance_scale: float = key(5.0, "classifier-free guidance of validation samples; ignored without classes")
    num_inference_steps: int = key(50, "denoising steps of validation samples", minimum=1)
