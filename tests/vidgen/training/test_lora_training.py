"""LoRA: the stated number of parameters, nothing else trained, the saved adapter, and resume."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file

from runs import assert_same_run, from_parent
from vidgen.common.errors import UserError
from vidgen.common.loading import load_pipeline, weights_hash
from vidgen.data.sprites import write_sprites
from vidgen.training.dit_trainer import DiTTrainer, train_dit

peft = pytest.importorskip("peft")
ADAPTER = "pytorch_lora_weights.safetensors"
STEADY = "optim.lr_scheduler=constant_with_warmup"


@torch.no_grad()
def predict(transformer: torch.nn.Module) -> torch.Tensor:
    noise = torch.randn(2, transformer.latent_size, generator=torch.Generator().manual_seed(0))
    return transformer(noise, torch.tensor([5, 900]), class_labels=torch.tensor([1, 8])).sample


@pytest.mark.parametrize(("rank", "targets"), [(2, ["to_q", "to_k", "to_v", "to_out"]), (3, ["ff.net.2"])])
def test_an_adapter_has_its_number_of_parameters_and_trains_only_those(
    dit_config, trained_dit, tmp_path, capsys, monkeypatch, rank, targets
):
    trainers = []
    fit = DiTTrainer.fit
    monkeypatch.setattr(DiTTrainer, "fit", lambda self: (trainers.append(self), fit(self))[1])
    lora = [f"lora.rank={rank}", "lora.alpha=4", f"lora.target_modules=[{', '.join(targets)}]"]
    final = train_dit(dit_config(tmp_path, *from_parent(trained_dit, *lora, "train.max_train_steps=3", STEADY)))

    # In every block a matrix (rank, inputs) and one (outputs, rank) for each target.
    original = load_pipeline(str(trained_dit)).transformer
    layers = [m for n, m in original.named_modules() if n.endswith(tuple(f".{t}" for t in targets))]
    count = sum(rank * (layer.in_features + layer.out_features) for layer in layers)
    assert len(layers) == 2 * len(targets)
    assert sum(tensor.numel() for tensor in load_file(final / ADAPTER).values()) == count
    assert f"{count:,} trainable and {original.num_parameters():,} frozen" in capsys.readouterr().out

    # Everything else is unchanged; the average is kept of the adapter only.
    trained = trainers[0].model
    weights = {name.replace(".base_layer", ""): value for name, value in trained.state_dict().items()}
    assert all(torch.equal(weights[name], value) for name, value in original.state_dict().items())
    assert sum(average.numel() for average in trainers[0].ema.shadow_params) == count
    assert trainers[0].optimizer.param_groups[0]["params"] == [p for p in trained.parameters() if p.requires_grad]


def test_the_saved_adapter_loads_into_the_pipeline_and_fuses(dit_config, trained_dit, tmp_path):
    settings = from_parent(trained_dit, "lora.rank=2", "lora.alpha=3", "optim.learning_rate=0.02")
    settings += ["lora.target_modules=[to_q, to_out, dynamics_out]", "train.max_train_steps=3"]
    final = train_dit(dit_config(tmp_path, *settings))
    assert sorted(path.name for path in final.iterdir()) == ["README.md", ADAPTER]
    pipeline = load_pipeline(str(trained_dit))
    before = predict(pipeline.transformer)
    pipeline.load_lora_weights(str(final))
    adapted = predict(pipeline.transformer)
    assert (adapted - before).abs().max() > 1e-3
    (config,) = pipeline.transformer.peft_config.values()
    assert (config.r, config.lora_alpha) == (2, 3)
    pipeline.fuse_lora()
    torch.testing.assert_close(predict(pipeline.transformer), adapted, rtol=1e-4, atol=1e-5)
    pipeline.unload_lora_weights()  # the fused weights stay
    torch.testing.assert_close(predict(pipeline.transformer), adapted, rtol=1e-4, atol=1e-5)
    pipeline.save_pretrained(tmp_path / "fused")
    torch.testing.assert_close(
        predict(load_pipeline(str(tmp_path / "fused")).transformer), adapted, rtol=1e-4, atol=1e-5
    )
    card = (final / "README.md").read_text()
    assert f'load_lora_weights("{final}")' in card
    assert str(trained_dit) in card and weights_hash(load_pipeline(str(trained_dit)).transformer) in card


def test_an_adapter_resumes_bit_for_bit_without_the_parent(dit_config, trained_dit, tmp_path):
    shutil.copytree(trained_dit, tmp_path / "parent")
    settings = from_parent(tmp_path / "parent", "lora.rank=2", "optim.name=muon", STEADY)
    settings += ["train.checkpointing_steps=2", "train.gradient_checkpointing=true"]
    train_dit(dit_config(tmp_path / "whole", "train.max_train_steps=4", *settings))
    train_dit(dit_config(tmp_path / "cut", "train.max_train_steps=2", *settings))
    shutil.rmtree(tmp_path / "cut" / "final")
    shutil.rmtree(tmp_path / "parent")
    train_dit(dit_config(tmp_path / "cut", "train.max_train_steps=4", "resume=latest", *settings))
    assert_same_run(tmp_path / "whole", tmp_path / "cut")
    with pytest.raises(UserError, match=r"because lora\.rank changed from 2 to 3"):
        train_dit(dit_config(tmp_path / "cut", "train.max_train_steps=5", "resume=latest", *settings, "lora.rank=3"))


def test_labels_are_those_of_the_parent(dit_config, trained_dit, tmp_path):
    """The adapter belongs to the parent's class table."""
    names = [
        name for _, name in sorted(load_pipeline(str(trained_dit)).config.id2label.items(), key=lambda x: int(x[0]))
    ]
    write_sprites(tmp_path / "sprites", 1, seed=3, resolution=32)
    data = tmp_path / "data"
    for name in names[3:5]:
        shutil.copytree(tmp_path / "sprites" / name, data / name)
    trainers = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DiTTrainer, "fit", lambda self: trainers.append(self))
        settings = from_parent(trained_dit, "lora.rank=1", f"data.root={data}")
        train_dit(dit_config(tmp_path / "run", *settings))
        assert trainers[0].label_ids.tolist() == [3, 4, 8] and trainers[0].classes == names
        (data / names[3]).rename(data / "unknown")
        with pytest.raises(UserError, match=r"trains no class table, and .* does not know the class .unknown."):
            train_dit(dit_config(tmp_path / "other", *settings))
