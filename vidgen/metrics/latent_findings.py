"""Sentences on the measures of a latent that are unusual, and why they make it hard to diffuse.

The limits are rules of thumb: they say where to look, not how good a DiT on the latent will be.
"""

from __future__ import annotations

from typing import Any

MAX_KURTOSIS = 3.0  # excess; that of the Laplace distribution
MAX_STD_RATIO = 3.0  # of the channels of a stream that is normalized as a whole
MAX_HIGH, MAX_HIGH_RATIO = 0.15, 3.0  # share of the upper half of the frequencies, and over that of the pixels
MAX_MOVED = 0.5  # distance from the shifted latent over that from the latent at equal positions
MAX_ONE_RATIO = 10.0  # response to one pixel over that of averaged pixels
MAX_SCALE = 0.5
MAX_LENGTH, MAX_STEP = 2.0, 2.0


def list_findings(record: dict[str, Any]) -> list[str]:
    """Sentences on what is unusual in a record of `vidgen.metrics.latent_diagnostics`; empty if nothing is."""
    findings = []
    for name, stream in record["streams"].items():
        findings += _check_stream(name, stream, record["normalizes_channels"])
    for name, grid in record["grids"].items():
        findings += _check_grid(name, grid)
    return findings + _check_interpolation(record["interpolation"])


def _check_stream(name: str, stream: dict[str, Any], normalizes_channels: bool) -> list[str]:
    findings = []
    channels, dead = stream["channels"], stream["dead_channels"]
    live = [channel for channel in channels if not channel["dead"]]
    if dead:
        findings.append(
            f"{name}: {len(dead)} of {len(channels)} channels are dead ({_list(dead)}). They hold no information, and "
            "a DiT that is trained on normalized channels has to generate their noise."
        )
    deviations = [channel["std"] for channel in live]
    ratio = max(deviations) / min(deviations) if deviations else 1.0
    if not normalizes_channels and ratio > MAX_STD_RATIO:
        findings.append(
            f"{name}: the deviations of the channels differ by a factor of {ratio:.1f}, and the stream is normalized "
            "as a whole, so the weak channels drown in noise early. latents.statistics=channel normalizes each."
        )
    heavy = {c: channel["kurtosis"] for c, channel in enumerate(channels) if channel in live}
    heavy = {c: kurtosis for c, kurtosis in heavy.items() if kurtosis > MAX_KURTOSIS}
    if heavy:
        findings.append(
            f"{name}: {len(heavy)} of {len(channels)} channels have heavy tails ({_list(list(heavy))}): their excess "
            f"kurtosis is up to {max(heavy.values()):.1f}, where a Gaussian has 0. Rare large values are far from the "
            "noise that sampling starts from."
        )
    return findings


def _check_grid(name: str, grid: dict[str, Any]) -> list[str]:
    findings = []
    rough = {
        axis: spectrum
        for axis, spectrum in grid["spectrum"].items()
        if spectrum["high"] > MAX_HIGH and spectrum["high"] > MAX_HIGH_RATIO * spectrum["pixel_high"]
    }
    if rough:
        shares = (f"{s['high']:.0%} over {axis} (averaged pixels: {s['pixel_high']:.0%})" for axis, s in rough.items())
        findings.append(
            f"{name}: much of the power is in the upper half of the frequencies, {', '.join(shares)}; white noise has "
            "50%. Diffusion determines high frequencies last and least accurately."
        )
    fixed = {
        axis: shift
        for axis, shift in grid["shift"].items()
        if shift["moved"] is not None and shift["moved"] > MAX_MOVED * shift["unmoved"]
    }
    if fixed:
        distances = (f"{s['moved']:.2f} over {axis} (unmoved: {s['unmoved']:.2f})" for axis, s in fixed.items())
        findings.append(
            f"{name}: the latent does not follow a shift of the clip by one position: its distance from the shifted "
            f"latent is {', '.join(distances)}. The same object has another code at every place."
        )
    jumpy = {
        axis: shift["one"] / shift["one_pixels"]
        for axis, shift in grid["shift"].items()
        if shift["one_pixels"] and shift["one"] > MAX_ONE_RATIO * shift["one_pixels"]
    }
    if jumpy:
        ratios = (f"{ratio:.0f} times over {axis}" for axis, ratio in jumpy.items())
        findings.append(
            f"{name}: a shift by one pixel or frame changes the latent far more than the averages of the pixels "
            f"({', '.join(ratios)}), so small motions are large steps."
        )
    if grid["scale"] is not None and grid["scale"] > MAX_SCALE:
        findings.append(
            f"{name}: the latent of an enlarged clip is not the enlarged latent (distance {grid['scale']:.2f}; "
            "unrelated latents have 1), so an object has another code at every size. loss.equivariance trains a VAE "
            "against this."
        )
    return findings


def _check_interpolation(interpolation: dict[str, Any]) -> list[str]:
    findings = []
    length, step = (interpolation.get(name, {}).get("mean", 1.0) for name in ("pixel_length", "largest_step"))
    if length > MAX_LENGTH:
        findings.append(
            f"The path of decoded clips between two latents is {length:.1f} times as long as the straight line: the "
            "decoder leaves the range of real clips between them."
        )
    if step > MAX_STEP:
        findings.append(
            f"The largest of {interpolation['steps']} equal steps between two latents changes the decoded clip "
            f"{step:.1f} times as much as the mean step: the decoder changes suddenly."
        )
    return findings


def _list(numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:8]))
    return shown if len(numbers) <= 8 else f"{shown}, ..."
