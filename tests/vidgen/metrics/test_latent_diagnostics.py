"""Diagnostics of latents: exact on autoencoders whose latents are known, and complete for VidTwin and its peers."""

from __future__ import annotations

import json
import math
import re
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from command_line import fail
from peers import tiny_peer
from torch import nn

from autoencoder import AutoencoderKLVidTwin
from autoencoder.adapters import adapt
from autoencoder.video_autoencoder import VideoAutoencoder
from vidgen.cli import main
from vidgen.common.errors import UserError
from vidgen.data.sprites import write_sprites
from vidgen.metrics.latent_diagnostics import diagnose_latents
from vidgen.metrics.latent_findings import list_findings
from vidgen.metrics.latent_grids import Distance, list_grids, power_spectrum


class AveragingAutoencoder(VideoAutoencoder, nn.Module):
    """Averages over 2 frames x 8 x 8 pixels, then `change`s the means; the decoder repeats values."""

    dtype, device, rule = torch.float32, torch.device("cpu"), SimpleNamespace(causal=False)
    clip_shape, min_size = (3, 4, 32, 32), 1
    latents_mean = latents_std = None

    def __init__(self, change=lambda means: means, logvar: float = -4.0) -> None:
        super().__init__()
        self.change, self.logvar = change, logvar
        channels = change(torch.zeros(1, 3, 2, 4, 4)).shape[1]
        self.structure_shape, self.dynamics_shape = (channels, 2, 4, 4), (0, 2, 0)

    def _encode(self, x):
        means = self.change(F.avg_pool3d(x, (2, 8, 8))).flatten(1)
        return torch.cat([means, torch.full_like(means, self.logvar)], dim=1)

    def _decode(self, z, components):
        return F.interpolate(z.structure[:, :3], size=(4, 32, 32))

    set_latent_statistics = fit_clip_size = fit_latent_shape = None


class CausalAutoencoder(AveragingAutoencoder):
    """The same of 5 frames, of which the first has a separate latent of half the size."""

    rule, clip_shape = SimpleNamespace(causal=True), (3, 5, 32, 32)

    def __init__(self) -> None:
        super().__init__()
        self.structure_shape = (3, 3, 4, 4)

    def _encode(self, x):
        means = torch.cat(
            [F.avg_pool3d(part, (t, 8, 8)) for part, t in ((x[:, :, :1] / 2, 1), (x[:, :, 1:], 2))], dim=2
        )
        return torch.cat([means.flatten(1), torch.full_like(means, -4.0).flatten(1)], dim=1)

    def _decode(self, z, components):
        return F.interpolate(z.structure, size=(5, 32, 32))


@pytest.fixture(scope="module")
def sprites(tmp_path_factory):
    root = tmp_path_factory.mktemp("sprites")
    write_sprites(root, 2, seed=0, resolution=48, num_frames=8)
    return root


def diagnose(vae, root, **options):
    return diagnose_latents(vae, root, num_clips=16, batch_size=5, **options).record


def test_a_latent_of_averages_is_that_of_the_pixels(sprites):
    record = diagnose(AveragingAutoencoder(), sprites)
    stream, grid = record["streams"]["structure"], record["grids"]["latent"]
    assert record["num_clips"] == 16 and stream["dead_channels"] == []
    for axis in ("time", "height", "width"):
        shift, spectrum = grid["shift"][axis], grid["spectrum"][axis]
        assert shift["moved"] == pytest.approx(0, abs=1e-9) and shift["unmoved"] > 1e-3
        assert shift["one"] == pytest.approx(shift["one_pixels"], rel=1e-4) and shift["one"] < shift["unmoved"]
        assert spectrum["power"] == pytest.approx(spectrum["pixel_power"], rel=1e-4)
        assert sum(spectrum["power"]) == pytest.approx(len(spectrum["power"]), rel=1e-6)
    assert grid["scale"] < 0.05
    assert record["interpolation"]["pixel_length"]["mean"] == pytest.approx(1, abs=1e-5)
    assert record["interpolation"]["largest_step"]["mean"] == pytest.approx(1, abs=1e-5)
    for channel in stream["channels"]:
        assert channel["nats"] == pytest.approx(0.5 * (math.log(channel["std"] ** 2 + math.exp(-4)) + 4), rel=1e-6)
    assert stream["nats_per_clip"] == pytest.approx(96 * stream["nats_per_value"])
    assert list_findings(record) == []


def test_the_first_latent_of_a_causal_model_is_not_shifted_in_time(sprites):
    grid = diagnose(CausalAutoencoder(), sprites)["grids"]["latent"]
    for axis, stride in (("time", 2), ("height", 8), ("width", 8)):
        assert grid["shift"][axis]["stride"] == stride
        assert grid["shift"][axis]["moved"] == pytest.approx(0, abs=1e-9) and grid["shift"][axis]["unmoved"] > 1e-4


def test_unusual_latents_are_found(sprites):
    def find(change, **options):
        return " ".join(list_findings(diagnose(AveragingAutoencoder(change, **options), sprites)))

    still = torch.arange(32).view(1, 1, 2, 4, 4) / 32
    constant = find(lambda means: torch.cat([means, 1e-6 * means[:, :1] + 2], dim=1))
    assert "1 of 4 channels are dead (3)" in constant
    silent = diagnose(AveragingAutoencoder(logvar=8.0), sprites)  # no information in the noise
    assert "3 of 3 channels are dead" in " ".join(list_findings(silent))
    assert silent["grids"]["latent"]["shift"]["height"]["moved"] == pytest.approx(0, abs=1e-9)
    assert "heavy tails" in find(lambda means: (means - means.mean()) ** 7)
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(32, generator=generator)
    shuffled = find(lambda means: means.flatten(2)[..., order].view_as(means))
    assert "does not follow a shift" in shuffled and "upper half of the frequencies" in shuffled
    signs = torch.randint(0, 2, (2, 4, 4), generator=generator) * 2.0 - 1
    assert "upper half of the frequencies" in find(lambda means: means * signs)
    assert "far more than the averages" in find(lambda means: torch.sin(200 * means))
    assert find(lambda means: means + still) == ""  # a pattern that all clips share


def test_deviations_that_differ_matter_where_streams_are_normalized(sprites):
    vae = AveragingAutoencoder(lambda means: torch.cat([means, 10 * means], dim=1))
    assert list_findings(diagnose(vae, sprites)) == []
    vae.normalizes_channels = False
    [finding] = list_findings(diagnose(vae, sprites))
    assert "differ by a factor of" in finding and "latents.statistics=channel" in finding


def test_sudden_decoders_are_found(sprites):
    vae = AveragingAutoencoder()
    vae._decode = lambda z, components: (
        z.structure.mean((2, 3, 4)).sign().view(-1, 3, 1, 1, 1).expand(-1, 3, 4, 32, 32)
    )
    record = diagnose(vae, sprites)
    assert record["interpolation"]["largest_step"]["mean"] > 2
    assert any("changes suddenly" in finding for finding in list_findings(record))
    curved = AveragingAutoencoder()
    curved._decode = lambda z, components: F.interpolate((30 * z.structure).sin(), size=(4, 32, 32))
    assert any("times as long as the straight line" in finding for finding in list_findings(diagnose(curved, sprites)))


def test_encoders_without_variance_have_no_rate(sprites):
    stream = diagnose(AveragingAutoencoder(logvar=-30.0), sprites)["streams"]["structure"]
    assert stream["nats_per_value"] is stream["kl_per_value"] is stream["channels"][0]["nats"] is None
    assert stream["dead_channels"] == []


def test_spectra_of_known_signals():
    noise = torch.randn(400, 2, 8, generator=torch.Generator().manual_seed(0))
    assert power_spectrum(noise, 2) == pytest.approx(torch.ones(2, 8).numpy(), abs=0.2)
    places = torch.arange(8, dtype=torch.float64)
    wave = torch.cos(math.pi * (places + 0.5) * 3 / 8) * math.sqrt(2)
    assert power_spectrum(wave.view(1, 1, 8), 2)[0].tolist() == pytest.approx([0, 0, 0, 8, 0, 0, 0, 0], abs=1e-9)
    along = power_spectrum(wave.view(1, 1, 8, 1).expand(1, 1, 8, 5), 3)  # constant over the other axis
    assert along[0].tolist() == pytest.approx([5 * wave.square().mean().item(), 0, 0, 0, 0], abs=1e-9)


def test_distances_are_relative_and_do_not_depend_on_batches():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 300, 3, 4, generator=generator) * torch.tensor([1.0, 5.0, 0.0])[:, None] + 2
    live = torch.tensor([True, True, True])  # but the last has no variance

    def measure(*pairs):
        distance = Distance()
        for pair in pairs:
            distance.add(*pair)
        return distance.compute(live)

    assert measure((a, a)) == 0 and measure((a, b)) == pytest.approx(1, abs=0.05)
    assert measure((a, 4 - a)) == pytest.approx(2, abs=1e-6)
    assert measure((a[:100], b[:100]), (a[100:], b[100:])) == pytest.approx(measure((a, b)), rel=1e-12)
    assert measure((a, a + torch.arange(4))) == pytest.approx(0, abs=1e-6)  # a pattern that all clips share
    only_first = Distance()
    only_first.add(a, torch.stack([a[:, 0], b[:, 1], b[:, 2]], dim=1))
    assert only_first.compute(torch.tensor([True, False, False])) == pytest.approx(0, abs=1e-9)
    assert only_first.compute(live) == pytest.approx(0.5, abs=0.03)
    assert Distance().compute(live) is None


def test_grids_of_vidtwin_and_of_a_causal_peer():
    tiny = AutoencoderKLVidTwin.from_preset("tiny-test")
    structure, width, height = list_grids(tiny)
    assert structure.axes == ("order", "height", "width") and structure.stride("height") == 16
    assert (width.axes, height.axes) == (("time", "width"), ("time", "height"))
    latents = tiny.unpack(torch.arange(tiny.latent_size)[None])
    parts = [width.select(latents), height.select(latents)]
    assert torch.equal(torch.cat(parts, dim=-1), latents.dynamics)
    assert (width.stride("time"), width.stride("width")) == (1, 32 // width.size("width"))
    clips = torch.randn(2, 3, 4, 32, 32)
    assert height.shape == (4, 2)
    assert torch.allclose(height.average(clips)[..., 0], clips[..., :16, :].mean(dim=(3, 4)), atol=1e-6)
    assert structure.average(clips).shape == (2, 3, 1, *tiny.structure_shape[2:])
    pooled = AutoencoderKLVidTwin.from_preset("tiny-test", dynamics_pool="qformer")
    assert [grid.axes for grid in list_grids(pooled)] == [("order", "height", "width"), ("time", "order")]
    single = AutoencoderKLVidTwin.from_preset("tiny-test", single_latent=True)
    assert [grid.axes for grid in list_grids(single)] == [("time", "height", "width")]

    [grid] = list_grids(adapt(tiny_peer("AutoencoderKLWan"), num_frames=9, height=32, width=32))
    assert grid.is_causal and grid.stride("time") == 8 // (grid.size("time") - 1)
    clips = torch.randn(1, 3, 9, 32, 32)
    side = 32 // grid.size("height")
    first = clips[:, :, 0].unfold(2, side, side).unfold(3, side, side).mean(dim=(-1, -2))
    assert torch.allclose(grid.average(clips)[:, :, 0], first, atol=1e-6)


@pytest.fixture(scope="module")
def tiny_vidtwin(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("vae")
    AutoencoderKLVidTwin.from_preset("tiny-test", bottleneck="residual").save_pretrained(folder)
    return folder


def test_the_command_writes_figures_and_a_page(sprites, tiny_vidtwin, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main(["latents", str(tiny_vidtwin), str(sprites), "--num-clips", "4", "--output", "a.json"])
    output = capsys.readouterr().out
    assert "structure: live channels" in output and output.splitlines()[-2:] == ["a.json", "latents.html"]
    record = json.loads((tmp_path / "a.json").read_text())
    assert record["streams"].keys() == {"structure", "dynamics"} and record["num_clips"] == 4
    assert record["grids"].keys() == {"structure", "dynamics over width", "dynamics over height"}
    assert {"sha256", "versions", "command", "findings", "fps"} <= record.keys()
    page = (tmp_path / "latents.html").read_text()
    assert not re.search(r'(src|href)\s*=\s*"(?!data:image/png)|https?:|url\(|<script', page)
    assert page.count("<svg") == 2 * 4 + 2 + 2 + 2 and page.count("<img") == 2 and "What to look for" in page

    tiny_peer("AutoencoderKLMagvit").save_pretrained(tmp_path / "peer")
    sizes = ["--num-frames", "5", "--size", "32"]
    main(["latents", "peer", str(sprites), "--num-clips", "3", *sizes, "--compare", "a.json", "--page", "b.html"])
    record = json.loads((tmp_path / "latents.json").read_text())
    assert record["grids"].keys() == {"latent"} and record["grids"]["latent"]["axes"] == ["time", "height", "width"]
    page = (tmp_path / "b.html").read_text()
    assert "<th>peer</th>" in page and f"<th>{'/'.join(tiny_vidtwin.parts[-2:])}</th>" in page


def test_wrong_arguments_end_with_one_sentence(sprites, tiny_vidtwin, tmp_path, capsys):
    command = ["latents", tiny_vidtwin, sprites]
    assert "num_clips must be 2 or more, not 1" in fail(capsys, *command, "--num-clips", 1)
    assert "fps must be positive" in fail(capsys, *command, "--fps", 0)
    assert "has the fixed clip size 4 x 32 x 32" in fail(capsys, *command, "--size", 64)
    assert "--size takes one side" in fail(capsys, *command, "--size", 1, 2, 3)
    (tmp_path / "x.json").write_text("[]")
    assert "is not a file that vidgen latents" in fail(capsys, *command, "--compare", tmp_path / "x.json")
    assert "No such file" in fail(capsys, *command, "--compare", tmp_path / "y.json")


def test_unreadable_videos_are_listed(sprites, tmp_path):
    write_sprites(tmp_path, 1, seed=1, resolution=32, num_frames=8)
    (tmp_path / "orbit" / "a.mp4").write_bytes(b"no video")
    record = diagnose(AveragingAutoencoder(), tmp_path)
    assert record["num_clips"] == 8
    [(path, _)] = record["skipped"]
    assert path.endswith("a.mp4")
    write_sprites(tmp_path / "short", 1, seed=1, resolution=32, num_frames=4)  # as long as a clip: no shift in time
    assert "time" not in diagnose(AveragingAutoencoder(), tmp_path / "short")["grids"]["latent"]["shift"]
    broken = AveragingAutoencoder(lambda means: means / 0)
    with pytest.raises(UserError, match=r"NaN|infinite|finite"):
        diagnose(broken, tmp_path)
