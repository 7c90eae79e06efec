"""Statistics that normalize latents for the DiT."""

import math

import pytest
import torch
from accelerate import Accelerator

from autoencoder import AutoencoderKLVidTwin
from pipelines.latents import denormalize_latents, normalize_latents
from vidgen.common.config import load_config
from vidgen.common.loading import load_vae
from vidgen.data.latent_cache import prepare_cache
from vidgen.data.latent_encoding import split_latents
from vidgen.data.sprites import write_sprites
from vidgen.training.config import DiTTrainingConfig
from vidgen.training.latent_statistics import choose_statistics, measure_response, scale_by_response


@pytest.fixture(scope="module")
def vae() -> AutoencoderKLVidTwin:
    torch.manual_seed(0)
    return AutoencoderKLVidTwin.from_preset("tiny-test", bottleneck="residual").eval()


@pytest.fixture(scope="module")
def trained(vae, tmp_path_factory):
    """A VAE's folder, and the cache of its latents of a few sprites."""
    folder = tmp_path_factory.mktemp("statistics")
    vae.save_pretrained(folder / "vae")
    write_sprites(folder / "data", 1, seed=0, resolution=32)
    settings = [f"vae={folder / 'vae'}", f"data.root={folder / 'data'}", "data.fps=4", f"output_dir={folder / 'run'}"]
    config = load_config(DiTTrainingConfig, [*settings, "latents.statistics=response"])
    loaded = load_vae(config.vae)
    return config, loaded, prepare_cache(config, loaded, Accelerator(cpu=True))


def test_parts_are_views_that_cover_the_latents(vae):
    for by, count in (("stream", 2), ("channel", 4 + 8), ("query", 4 * 3 + 8)):
        packed = torch.zeros(2, vae.latent_size)
        parts = split_latents(vae.unpack(packed), by)
        assert len(parts) == count
        for part in parts:
            part += 1
        assert (packed == 1).all()


def test_response_is_the_change_of_the_pixels(vae, monkeypatch):
    """A decoder of known gains has these responses, whatever the deviation of a part."""
    gains = torch.arange(1, 21, dtype=torch.float32)

    def decode(packed):
        parts = split_latents(vae.unpack(packed), "query")
        sample = torch.cat([gain * part.flatten(1) for gain, part in zip(gains, parts, strict=True)], dim=1)
        return type("Output", (), {"sample": sample})

    monkeypatch.setattr(vae, "decode", decode)
    std = [0.5] * 10 + [2.0] * 10
    response = measure_response(vae, torch.randn(3, vae.latent_size), std, "query")
    sizes = torch.tensor(
        [part[0].numel() for part in split_latents(vae.unpack(torch.zeros(1, vae.latent_size)), "query")]
    )
    expected = gains * torch.tensor(std) * (sizes / vae.latent_size).sqrt()
    torch.testing.assert_close(torch.tensor(response), expected, rtol=1e-5, atol=0)


def test_deviations_are_in_proportion_to_the_response(trained):
    config, vae, cache = trained
    mean, std = choose_statistics(config, vae, cache, None)
    assert (mean, std) == scale_by_response(vae, cache)  # draws nothing
    latents = torch.stack([cache[i]["mean"] for i in range(len(cache))])
    normalized = normalize_latents(latents, vae, mean, std)
    torch.testing.assert_close(denormalize_latents(normalized, vae, mean, std), latents, rtol=1e-4, atol=1e-5)

    deviations = torch.stack([x.std(correction=0) for x in split_latents(vae.unpack(normalized), "query")])
    measured = cache.measure_statistics(vae, "query")[1]
    response = torch.tensor(measure_response(vae, latents, measured, "query"))
    for stream in (slice(0, 12), slice(12, None)):
        assert deviations[stream].square().mean().sqrt() == pytest.approx(1, abs=0.02)
        expected = response[stream] / response[stream].square().mean().sqrt()
        torch.testing.assert_close(deviations[stream], expected, rtol=0.1, atol=0.02)


def test_streams_have_one_statistic(trained):
    _, vae, cache = trained
    mean, std = cache.measure_statistics(vae, "stream")
    assert len(mean) == len(std) == 2 and all(map(math.isfinite, mean + std))


def test_wrong_number_of_statistics_is_named(vae):
    with pytest.raises(
        ValueError, match="have 5 values, but the latents have 2 streams, 12 channels, and 20 channels"
    ):
        normalize_latents(torch.zeros(1, vae.latent_size), vae, [0.0] * 5, [1.0] * 5)
