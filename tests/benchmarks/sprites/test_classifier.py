"""The sprite classifier: its data, its predictions and its training."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator

from benchmarks.sprites.classifier import DrawnSprites, SpriteClassifier, classifier_loss, degrade, train_classifier
from benchmarks.sprites.latent_swap import CLASSES, sprite_targets
from vidgen.data.sprites import MOTIONS, render_sprite

SIZES = dict(num_frames=4, resolution=32)
SMALL = dict(width=8, dim=16)


@pytest.fixture(scope="module")
def sprites() -> DrawnSprites:
    return DrawnSprites(24, seed=7, **SIZES)


@pytest.fixture
def classifier() -> SpriteClassifier:
    torch.manual_seed(0)
    return SpriteClassifier(**SMALL)


def batch_of(sprites: DrawnSprites) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    return sprites.clips(), dict(sprites.targets)


# --- data -------------------------------------------------------------------------------------------


def test_drawn_sprites_and_their_factors(sprites):
    assert len(sprites) == 24
    clip = sprites[9]["clip"]
    assert clip.shape == (3, 4, 32, 32) and clip.min() >= -1 and clip.max() <= 1
    assert torch.equal(clip, sprites.clips()[9])
    assert [int(sprites[i]["motion"]) for i in range(24)] == [*range(8)] * 3
    drawn = torch.from_numpy(render_sprite(sprites.factors[9])).movedim(-1, 0).float() / 127.5 - 1
    torch.testing.assert_close(clip, drawn)
    assert torch.equal(sprites[9]["position"], sprite_targets(sprites.factors)["position"][9])


def test_drawn_sprites_are_those_of_write_sprites(sprites, tmp_path):
    import json

    from vidgen.data.sprites import write_sprites

    write_sprites(tmp_path, 2, seed=7, resolution=32, num_frames=4)
    written = json.loads((tmp_path / "bounce" / "bounce_0001.json").read_text())
    assert written == sprites.factors[8 + MOTIONS.index("bounce")]
    assert DrawnSprites(8, seed=8, **SIZES).factors[0] != sprites.factors[0]


def test_degrade_blurs_and_adds_noise(sprites):
    clips = sprites.clips()
    torch.manual_seed(0)
    found = [degrade(clips) for _ in range(12)]
    assert all(clip.shape == clips.shape for clip in found)
    detail = torch.stack([clip.diff(dim=-1).abs().mean(dim=(1, 2, 3, 4)) for clip in found])
    detail /= clips.diff(dim=-1).abs().mean(dim=(1, 2, 3, 4))
    assert detail.min() < 0.8  # blurred, without noise
    assert detail.max() > 1.5  # noisy
    assert all((clip - clips).mean().abs() < 0.02 for clip in found)


# --- predictions -------------------------------------------------------------------------------------------------


def test_predictions_have_the_shapes_of_the_targets(classifier, sprites):
    clips, targets = batch_of(sprites)
    predicted = classifier.predict(clips, batch_size=10)
    for name, wanted in targets.items():
        if name != "background":
            assert predicted[name].shape == wanted.shape and predicted[name].dtype == wanted.dtype, name
    parts = predicted["place"] + predicted["slow_motion"] + predicted["fast_motion"]
    torch.testing.assert_close(parts, predicted["position"])


def test_predictions_do_not_depend_on_the_batch(classifier, sprites):
    clips, _ = batch_of(sprites)
    together, apart = classifier.predict(clips), classifier.predict(clips, batch_size=1)
    torch.testing.assert_close(together["colors"], apart["colors"], atol=1e-3, rtol=1e-4)


def test_videos_of_any_length_have_a_position_per_frame(classifier):
    assert classifier.predict(torch.zeros(1, 3, 11, 32, 32))["position"].shape == (1, 11, 2)


def test_loss_is_lowest_for_the_targets_and_ignores_positions_of_two_shapes(sprites):
    _, targets = batch_of(sprites)
    sure = {name: 20 * torch.nn.functional.one_hot(targets[name], len(CLASSES[name])).float() for name in CLASSES}
    found = sure | {"colors": targets["colors"].flatten(1).float() / 255, "position": targets["position"] / 32}
    assert classifier_loss(found, targets, 32) < 1e-4
    for name in ("motion", "shape", "texture", "colors", "position"):
        wrong = found | {name: found[name].roll(1, dims=0)}
        assert classifier_loss(wrong, targets, 32) > 1e-2, name
    two = targets["motion"] == MOTIONS.index("swap")
    elsewhere = found["position"] + 0.3 * two[:, None, None]
    assert classifier_loss(found | {"position": elsewhere}, targets, 32) < 1e-4


# --- training --------------------------------------------------------------------------------------------------


def test_classifier_learns_positions_and_can_be_saved(tmp_path):
    torch.set_num_threads(1)
    settings = dict(batch_size=8, sprites=64, seed=5, **SIZES, **SMALL)
    sprites = DrawnSprites(32, seed=6, **SIZES)
    one_shape = sprites.targets["motion"] != MOTIONS.index("swap")

    def off(classifier: SpriteClassifier) -> float:
        wrong = classifier.predict(sprites.clips())["position"] - sprites.targets["position"]
        return wrong.norm(dim=2)[one_shape].mean().item()

    accelerator = Accelerator(cpu=True)
    begun, learned = (train_classifier(accelerator, steps=steps, **settings) for steps in (1, 60))
    assert off(learned) < 0.5 * off(begun)
    again = train_classifier(accelerator, steps=60, **settings)
    assert off(again) == pytest.approx(off(learned), rel=1e-4)
    learned.save_pretrained(tmp_path)
    assert off(SpriteClassifier.from_pretrained(tmp_path)) == off(learned)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "diffusion_pytorch_model.safetensors"]
