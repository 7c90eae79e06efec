"""The compared options of the VAE's and of the DiT's training; see docs/training.md."""

from __future__ import annotations

from dataclasses import dataclass

BASELINE = "baseline"
# Settings of the VAE, by the name of its runs; several variants share one.
VAES: dict[str, list[str]] = {
    "plain": [],
    "equivariance": ["loss.equivariance=0.5"],
    "nested_dropout": ["loss.nested_dropout=0.5"],
    "equivariance_nested_dropout": ["loss.equivariance=0.5", "loss.nested_dropout=0.5"],
}
VAE_LABELS = {
    "plain": "none",
    "equivariance": "scale equivariance",
    "nested_dropout": "nested dropout",
    "equivariance_nested_dropout": "both",
}
SELF_ALIGNMENT = ("diffusion.self_alignment=0.2",)
CLASS_VECTORS = ("model.overrides.class_embed_std=0.5",)
# The learning rates were chosen on gestures (docs/results/real.md): 0.004 for Muon, 0.0016 for AdamW.
MUON = (
    "optim.name=muon",
    "optim.muon_modulations=true",
    "optim.learning_rate=4.0e-3",
    "optim.adamw_lr_scale=0.4",
)
LOGIT_NORMAL = ("diffusion.timestep_sampling=logit_normal", "diffusion.logit_mean=0.5")
HIGH_NOISE = ("diffusion.timestep_sampling=logit_normal", "diffusion.logit_mean=1.0")


@dataclass(frozen=True)
class Variant:
    """A VAE and a DiT on its latents.

    Args:
        label: in tables.
        vae: key of `VAES`.
        dit: settings of the DiT.
    """

    label: str
    vae: str = "plain"
    dit: tuple[str, ...] = ()


VARIANTS = {
    BASELINE: Variant("none"),
    "equivariance": Variant("scale equivariance", "equivariance"),
    "nested_dropout": Variant("nested dropout", "nested_dropout"),
    "self_alignment": Variant("self-alignment", dit=SELF_ALIGNMENT),
    "logit_normal": Variant("timesteps toward noise, logit_mean 0.5", dit=LOGIT_NORMAL),
    "high_noise": Variant("timesteps toward noise, logit_mean 1", dit=HIGH_NOISE),
    "class_vectors": Variant("larger class vectors", dit=CLASS_VECTORS),
    "muon": Variant("Muon", dit=MUON),
    "muon_class_vectors": Variant("Muon, larger class vectors", dit=MUON + CLASS_VECTORS),
    "combined": Variant("first three, logit_mean 0.5", "equivariance_nested_dropout", SELF_ALIGNMENT + LOGIT_NORMAL),
}
SMOKE = (BASELINE, "combined")


def list_variants(scale: str) -> dict[str, Variant]:
    """The variants of a scale."""
    return {name: variant for name, variant in VARIANTS.items() if scale != "smoke" or name in SMOKE}
