"""Disentanglement of a VAE whose structure is the mean frame and whose dynamics is the difference from it."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from autoencoder import TwinLatents
from benchmarks.sprites import disentanglement as module
from benchmarks.sprites.disentanglement import (
    COMPONENTS,
    ENDS,
    FEATURES,
    EncodedSprites,
    component_errors,
    component_scores,
    measure_disentanglement,
)
from vidgen.data.sprites import MOTIONS, write_sprites

T, SIDE = 8, 16


class MeanAndRest:
    """Structure: the mean over frames; dynamics: the differences from it. With `swapped`, the other way round."""

    clip_shape, dynamics_shape, device = (3, T, SIDE, SIDE), (3, T - 1, SIDE * SIDE), torch.device("cpu")

    def __init__(self, swapped: bool = False):
        self.swapped = swapped

    def encode(self, clips):
        mean = clips.mean(dim=2, keepdim=True)
        parts = [mean.flatten(1), (clips - mean)[:, :, :-1].flatten(1)]  # the last one follows
        packed = torch.cat(parts[::-1] if self.swapped else parts, dim=1)
        return SimpleNamespace(latent_dist=SimpleNamespace(mode=lambda: packed))

    def unpack(self, packed):
        sizes = [3 * SIDE * SIDE, 3 * (T - 1) * SIDE * SIDE]
        return TwinLatents(*packed.split(sizes[::-1] if self.swapped else sizes, dim=1))

    def decode(self, latents, components="both"):
        parts = {"structure": latents.structure, "dynamics": latents.dynamics}
        shown = [x.unflatten(1, (3, -1, SIDE, SIDE)) for name, x in parts.items() if components in ("both", name)]
        clips = [x if x.shape[2] == 1 else torch.cat([x, -x.sum(dim=2, keepdim=True)], dim=2) for x in shown]
        return SimpleNamespace(sample=sum(clips).expand(-1, -1, T, -1, -1))


@pytest.fixture(scope="module")
def roles():
    return measure_disentanglement(MeanAndRest(), (24, 8), (0, 1))


def test_both_latents_reconstruct_the_clip(roles):
    components = roles["components"]
    assert list(components) == ["original", *COMPONENTS]
    for name in ("original", "both"):
        assert components[name]["psnr"].value == 100
        assert components[name]["change"].value == pytest.approx(1, abs=1e-6)
    assert components["both"]["motion"] == components["original"]["motion"]


def test_scores_of_one_latent_alone(roles):
    structure, dynamics = roles["components"]["structure"], roles["components"]["dynamics"]
    assert structure["change"].value == pytest.approx(0, abs=1e-6) == structure["change"].chance
    assert dynamics["change"].value > 0.5  # except for clamped values
    assert structure["psnr"].low > dynamics["psnr"].high
    assert structure["motion"].value < roles["components"]["both"]["motion"].value


def test_probes_of_each_latent(roles):
    assert set(roles["values"]) == set(FEATURES)
    assert roles["values"]["structure"] + roles["values"]["dynamics"] == roles["values"]["both"]
    assert roles["values"]["pixels"] == 3 * T * SIDE * SIDE  # no more than the clip has

    def probe(target, features):
        return roles["probes"][target][features]["r2"]

    assert probe("background", "structure").low > probe("background", "dynamics").high
    assert probe("slow_motion", "dynamics").low > 0.2
    assert probe("place", "structure").low > 0.3


def test_swapped_latents_swap_the_scores(roles):
    swapped = measure_disentanglement(MeanAndRest(swapped=True), (24, 8), (0, 1))
    background = swapped["probes"]["background"]
    assert background["dynamics"]["r2"].low > background["structure"]["r2"].high
    assert swapped["components"]["dynamics"]["change"].value == pytest.approx(0, abs=1e-6)
    straight, back = (found["latent_swap"]["likeness"] for found in (roles, swapped))
    # The backgrounds are in the mean frames, and they determine the nearest clip.
    assert straight["a"]["psnr"].low > straight["b"]["psnr"].high
    assert straight["a_as_b"]["psnr"].low > straight["b_as_a"]["psnr"].high
    assert back["b"]["psnr"].low > back["a"]["psnr"].high
    assert sum(straight[end]["nearest"].value for end in ENDS) == pytest.approx(1)


def test_chance_is_from_unrelated_clips(monkeypatch):
    asked, given = [], []
    choose, judge = module.unrelated_pairs, module.factor_attribution
    monkeypatch.setattr(module, "unrelated_pairs", lambda partner: asked.append(partner) or choose(partner))
    monkeypatch.setattr(module, "factor_attribution", lambda *sides: given.append(sides) or judge(*sides))
    measure_disentanglement(MeanAndRest(), (4, 3), (0, 1))
    [(_, a, b, unrelated)], [partner] = given, asked
    assert torch.equal(a["position"][partner], b["position"])
    drawn = unrelated["motion"][choose(partner).argsort()]  # back in the order of A
    assert (drawn == a["motion"]).double().mean() > 0.5 > (unrelated["motion"] == a["motion"]).double().mean()


def test_encoded_sprites_are_those_of_write_sprites(tmp_path):
    sprites = EncodedSprites(MeanAndRest(), 2, seed=5)
    files = write_sprites(tmp_path, 2, seed=5, resolution=SIDE, num_frames=T, fps=8)
    assert [path.parent.name for path in files] == [clip["motion"] for clip in sprites.factors]
    assert len(sprites.factors) == 2 * len(MOTIONS)
    assert [json.loads(path.with_suffix(".json").read_text()) for path in files] == sprites.factors


def test_change_is_explained_variance():
    clip = torch.rand(2, 3, T, 8, 8, generator=torch.Generator().manual_seed(0)) - 0.5
    for decoded, expected in ((clip, 1), (clip + 0.2, 1), (clip.flip(2) * 0, 0), (clip * 0.5, 0.75), (-clip, -3)):
        change = component_scores([component_errors(decoded, clip)])["change"]
        assert change.value == pytest.approx(expected, abs=1e-5)
        assert change.low - 1e-9 <= change.value <= change.high + 1e-9


def test_single_latent_is_refused():
    vae = MeanAndRest()
    vae.dynamics_shape = (0, T, 0)
    with pytest.raises(ValueError, match="one latent"):
        measure_disentanglement(vae, (2, 2), (0, 1))
