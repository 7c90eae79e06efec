"""The judge of sprites: what it is trained on, what it returns, and that it learns to see."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator

from benchmarks.sprites.classifier import DrawnSprites, SpriteScorer, scorer_loss, train_scorer, weathered
from benchmarks.sprites.latent_swap import CLASSES, sprite_targets
from vidgen.data.sprites import MOTIONS, render_sprite

SIZES = dict(num_frames=4, resolution=32)
SMALL = dict(width=8, dim=16)


@pytest.fixture(scope="module")
def sprites() -> DrawnSprites:
    return DrawnSprites(24, seed=7, **SIZES)


@pytest.fixture
def scorer() -> SpriteScorer:
    torch.manual_seed(0)
    return SpriteScorer(**SMALL)


def batch_of(sprites: DrawnSprites) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    return sprites.clips(), dict(sprites.targets)


# --- what it is trained on -------------------------------------------------------------------------------------------


def test_sprites_come_motion_by_motion_with_their_factors(sprites):
    assert len(sprites) == 24
    clip = sprites[9]["clip"]
    assert clip.shape == (3, 4, 32, 32) and clip.min() >= -1 and clip.max() <= 1
    assert torch.equal(clip, sprites.clips()[9])
    assert [int(sprites[i]["motion"]) for i in range(24)] == [*range(8)] * 3
    drawn = torch.from_numpy(render_sprite(sprites.factors[9])).movedim(-1, 0).float() / 127.5 - 1
    torch.testing.assert_close(clip, drawn)
    assert torch.equal(sprites[9]["position"], sprite_targets(sprites.factors)["position"][9])


def test_they_are_those_of_write_sprites_and_of_no_other_seed(sprites, tmp_path):
    import json

    from vidgen.data.sprites import write_sprites

    write_sprites(tmp_path, 2, seed=7, resolution=32, num_frames=4)
    written = json.loads((tmp_path / "bounce" / "bounce_0001.json").read_text())
    assert written == sprites.factors[8 + MOTIONS.index("bounce")]
    assert DrawnSprites(8, seed=8, **SIZES).factors[0] != sprites.factors[0]


def test_weathering_softens_and_leaves_what_there_is(sprites):
    clips = sprites.clips()
    torch.manual_seed(0)
    found = [weathered(clips) for _ in range(12)]
    assert all(clip.shape == clips.shape for clip in found)
    detail = torch.stack([clip.diff(dim=-1).abs().mean(dim=(1, 2, 3, 4)) for clip in found])
    detail /= clips.diff(dim=-1).abs().mean(dim=(1, 2, 3, 4))
    assert detail.min() < 0.8  # soft and without noise
    assert detail.max() > 1.5  # noisy
    assert all((clip - clips).mean().abs() < 0.02 for clip in found)


# --- what it returns -------------------------------------------------------------------------------------------------


def test_a_reading_has_what_the_factors_have(scorer, sprites):
    clips, targets = batch_of(sprites)
    shown = scorer.read(clips, batch_size=10)
    for name, wanted in targets.items():
        if name != "background":
            assert shown[name].shape == wanted.shape and shown[name].dtype == wanted.dtype, name
    assert shown["features"].shape == (24, scorer.dim)
    assert torch.all((shown["probability"] > 1 / 8 - 1e-6) & (shown["probability"] <= 1))
    parts = shown["place"] + shown["slow_motion"] + shown["fast_motion"]
    torch.testing.assert_close(parts, shown["position"])


def test_readings_do_not_depend_on_the_batch(scorer, sprites):
    clips, _ = batch_of(sprites)
    together, apart = scorer.read(clips), scorer.read(clips, batch_size=1)
    torch.testing.assert_close(together["features"], apart["features"], atol=1e-5, rtol=1e-4)


def test_videos_of_any_length_have_places_in_every_frame(scorer):
    assert scorer.read(torch.zeros(1, 3, 11, 32, 32))["position"].shape == (1, 11, 2)


def test_the_loss_is_least_for_what_is_true_and_blind_to_the_places_of_two_shapes(sprites):
    _, targets = batch_of(sprites)
    sure = {name: 20 * torch.nn.functional.one_hot(targets[name], len(CLASSES[name])).float() for name in CLASSES}
    found = sure | {"colors": targets["colors"].flatten(1).float() / 255, "position": targets["position"] / 32}
    assert scorer_loss(found, targets, 32) < 1e-4
    for name in ("motion", "shape", "texture", "colors", "position"):
        wrong = found | {name: found[name].roll(1, dims=0)}
        assert scorer_loss(wrong, targets, 32) > 1e-2, name
    two = targets["motion"] == MOTIONS.index("swap")
    elsewhere = found["position"] + 0.3 * two[:, None, None]
    assert scorer_loss(found | {"position": elsewhere}, targets, 32) < 1e-4


# --- what it learns --------------------------------------------------------------------------------------------------


def test_it_learns_where_shapes_are_and_is_saved_as_it_is(tmp_path):
    torch.set_num_threads(1)
    settings = dict(batch_size=8, sprites=64, seed=5, **SIZES, **SMALL)
    sprites = DrawnSprites(32, seed=6, **SIZES)
    one_shape = sprites.targets["motion"] != MOTIONS.index("swap")

    def off(scorer: SpriteScorer) -> float:
        wrong = scorer.read(sprites.clips())["position"] - sprites.targets["position"]
        return wrong.norm(dim=2)[one_shape].mean().item()

    accelerator = Accelerator(cpu=True)
    begun, learned = (train_scorer(accelerator, steps=steps, **settings) for steps in (1, 60))
    assert off(learned) < 0.5 * off(begun)
    again = train_scorer(accelerator, steps=60, **settings)
    assert off(again) == pytest.approx(off(learned), rel=1e-4)
    learned.save_pretrained(tmp_path)
    assert off(SpriteScorer.from_pretrained(tmp_path)) == off(learned)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "diffusion_pytorch_model.safetensors"]
