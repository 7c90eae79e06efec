"""The summary of the data that a training prints first."""

from __future__ import annotations

from vidgen.common.config import load_config
from vidgen.data.sprites import write_sprites
from vidgen.training import vae_trainer as module
from vidgen.training.config import VAETrainingConfig


def test_the_autoencoder_training_prints_the_summary_of_each_data_set(tmp_path, monkeypatch, capsys):
    class Trainer:
        def __init__(self, *_):
            self.fit = lambda: print("begun")

    monkeypatch.setattr(module, "VAETrainer", Trainer)
    for part in ("train", "validation"):
        write_sprites(tmp_path / part, 1, seed=0, resolution=32, num_frames=8)
    roots = [f"data.root={tmp_path}/train", f"data.validation_root={tmp_path}/validation"]
    small = ["model.preset=tiny-test", "data.num_frames=4", "data.resolution=32", "train.mixed_precision=no"]
    module.train_vae(load_config(VAETrainingConfig, [*roots, *small, f"output_dir={tmp_path}/run"]))
    printed = capsys.readouterr().out
    for part in ("train", "validation"):
        assert f"{tmp_path}/{part}: 8 videos, 8 classes (bounce, orbit, " in printed
    assert printed.index(f"{tmp_path}/validation: ") < printed.index("parameters") < printed.index("begun")
