"""Optimizers and learning rate schedules of a config."""

from __future__ import annotations

import copy
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from autoencoder import AutoencoderKLVidTwin
from pipelines import VidTwinTransformer3DModel
from runs import assert_same_run
from vidgen.common.errors import UserError
from vidgen.training import optimizers
from vidgen.training.config import OptimConfig
from vidgen.training.failures import TrainingDiverged
from vidgen.training.optimizers import (
    MuonWithAdamW,
    block_matrices,
    build_lr_scheduler,
    build_optimizer,
    configured_settings,
    orthogonalize,
    warmup_warning,
)
from vidgen.training.vae_trainer import VAETrainer, train_vae


def groups() -> dict[str, tuple[list[nn.Parameter], float]]:
    return {name: ([nn.Parameter(torch.ones(3))], factor) for name, factor in (("model", 1.0), ("other", 0.5))}


def test_every_config_key_reaches_its_group():
    config = OptimConfig(learning_rate=0.1, adam_beta1=0.8, adam_beta2=0.95, adam_weight_decay=0.3, adam_epsilon=1e-6)
    optimizer = build_optimizer(groups(), config)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.05]
    for group in optimizer.param_groups:
        assert (group["betas"], group["weight_decay"], group["eps"]) == ((0.8, 0.95), 0.3, 1e-6)


@pytest.mark.parametrize("name", ["cosine", "constant_with_warmup", "linear", "polynomial"])
def test_a_resumed_schedule_continues_unchanged(name):
    config = OptimConfig(learning_rate=0.1, lr_scheduler=name, lr_warmup_steps=3)

    def rates(after: int) -> list[float]:
        optimizer = build_optimizer(groups(), config)
        scheduler = build_lr_scheduler(optimizer, config, 9)
        if after:
            scheduler = build_lr_scheduler(optimizer, config, 9, after)
        seen = []
        for _ in range(after, 9):
            seen.append([group["lr"] for group in optimizer.param_groups])
            optimizer.step()
            scheduler.step()
        return seen

    whole = rates(0)
    assert whole[0] == [0, 0] and whole[3] == [0.1, 0.05]
    assert all(rates(after) == whole[after:] for after in (1, 4))


@pytest.mark.parametrize("name", ["cosine", "constant_with_warmup"])
@pytest.mark.parametrize(("steps", "peak_step"), [(100, 10), (499, 49), (500, 499), (2000, 500)])
def test_a_warmup_longer_than_the_run_is_shortened_with_a_warning(name, steps, peak_step):
    config = OptimConfig(learning_rate=0.1, lr_scheduler=name, lr_warmup_steps=500)
    optimizer = build_optimizer(groups(), config)
    scheduler = build_lr_scheduler(optimizer, config, steps)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates.index(max(rates)) == peak_step
    warning = warmup_warning(config, steps)
    if steps >= 500:
        assert warning is None
    else:
        assert max(rates) == 0.1
        assert f"optim.lr_warmup_steps=500 is more than train.max_train_steps={steps}" in warning
        assert f"would peak at {0.1 * (steps - 1) / 500:.2g} instead of 0.1" in warning
        assert f"shortened to {steps // 10} steps, and the peak learning rate is 0.1" in warning


def test_a_run_without_steps_or_warmup_gets_no_warning():
    assert warmup_warning(OptimConfig(), 0) is None
    assert warmup_warning(OptimConfig(lr_scheduler="constant"), 10) is None


def test_a_wrong_value_is_one_sentence():
    with pytest.raises(UserError, match=r"optim\.adam_beta1 must be below 1, not 2"):
        build_optimizer(groups(), OptimConfig(adam_beta1=2))
    for name in ("square", "piecewise_constant"):
        with pytest.raises(UserError, match=r"optim\.lr_scheduler"):
            build_lr_scheduler(build_optimizer(groups(), OptimConfig()), OptimConfig(lr_scheduler=name), 9)


# --- Muon -----------------------------------------------------------------------------------------------------------

MUON = OptimConfig(name="muon", learning_rate=0.01, adam_weight_decay=0.1)


def model(seed: int = 0) -> VidTwinTransformer3DModel:
    torch.manual_seed(seed)
    return VidTwinTransformer3DModel.from_preset("tiny-test", num_classes=2)


def muon_of(trained: VidTwinTransformer3DModel, other: nn.Parameter) -> MuonWithAdamW:
    return build_optimizer({"model": (list(trained.parameters()), 1.0), "other": ([other], 0.5)}, MUON, trained)


def give_gradients(parameters: list[nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def test_muon_has_the_matrices_of_blocks_and_adamw_the_rest():
    trained, other = model(), nn.Parameter(torch.ones(2, 2))
    groups = {group["name"]: group for group in muon_of(trained, other).param_groups}
    assert [*groups] == ["matrices", "model", "other"]
    assert [group["lr"] for group in groups.values()] == [0.01, 0.01, 0.005]
    names = {id(parameter): name for name, parameter in trained.named_parameters()}
    matrices = [names[id(parameter)] for parameter in groups["matrices"]["params"]]
    per_block = ["attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out", "ff.net.0.proj", "ff.net.2"]
    blocks = range(len(trained.transformer_blocks))
    assert matrices == [f"transformer_blocks.{i}.{layer}.weight" for i in blocks for layer in per_block]
    rest = [names[id(parameter)] for parameter in groups["model"]["params"]]
    assert sorted(matrices + rest) == sorted(names.values()) and groups["other"]["params"] == [other]


def test_adamw_has_a_learning_rate_beside_muons():
    trained, other = model(), nn.Parameter(torch.ones(3))
    config = replace(MUON, learning_rate=0.1, adamw_lr_scale=0.2)
    optimizer = build_optimizer({"model": (list(trained.parameters()), 1.0), "other": ([other], 0.5)}, config, trained)
    rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
    assert rates == pytest.approx({"matrices": 0.1, "model": 0.02, "other": 0.01})
    for name in ("adamw", "torch.optim.RAdam"):
        with pytest.raises(UserError, match="adamw_lr_scale is a factor beside Muon"):
            build_optimizer(groups(), OptimConfig(name=name, adamw_lr_scale=0.2))


def test_muon_can_train_the_modulations_too():
    trained = model()
    names = {id(parameter): name for name, parameter in trained.named_parameters()}
    groups_of = {
        setting: {
            group["name"]: {names[id(p)] for p in group["params"]}
            for group in build_optimizer(
                {"model": (list(trained.parameters()), 1.0)}, replace(MUON, muon_modulations=setting), trained
            ).param_groups
        }
        for setting in (False, True)
    }
    moved = {f"transformer_blocks.{i}.modulation.1.weight" for i in range(len(trained.transformer_blocks))}
    assert groups_of[True]["matrices"] == groups_of[False]["matrices"] | moved
    assert groups_of[True]["model"] == groups_of[False]["model"] - moved
    with pytest.raises(UserError, match="muon_modulations chooses what Muon trains"):
        build_optimizer(groups(), OptimConfig(name="adamw", muon_modulations=True))


def test_an_autoencoders_matrices_are_those_of_its_blocks_and_of_the_q_former():
    vae = AutoencoderKLVidTwin.from_preset("tiny-test", bottleneck="residual")
    matrices = {id(weight) for weight in block_matrices(vae)}
    names = [name for name, parameter in vae.named_parameters() if id(parameter) in matrices]
    assert len(names) == len(block_matrices(vae)) and not any("patch_embed" in n or "proj_out" in n for n in names)
    for part in ("encoder.transformer", "decoder.transformer", "structure_encoder.temporal_pool.layers"):
        assert any(name.startswith(part) for name in names)


def test_it_steps_as_muon_and_adamw_do():
    (ours, theirs), others = (model(), model()), [nn.Parameter(torch.ones(3)) for _ in range(2)]
    together = muon_of(ours, others[0])
    ids = {id(weight) for weight in block_matrices(theirs)}
    rest = [p for p in theirs.parameters() if id(p) not in ids]
    shared = dict(lr=0.01, weight_decay=0.1)
    muon = torch.optim.Muon(block_matrices(theirs), adjust_lr_fn="match_rms_adamw", **shared)
    adamw = torch.optim.AdamW(
        [{"params": rest}, {"params": [others[1]], "lr": 0.005}], betas=(0.9, 0.99), fused=True, **shared
    )
    for seed in range(3):
        give_gradients([*ours.parameters(), others[0]], seed)
        give_gradients([*theirs.parameters(), others[1]], seed)
        together.step()
        muon.step()
        adamw.step()
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    assert torch.equal(*others)


@pytest.mark.parametrize("before", [0, 2])
def test_a_value_that_is_not_finite_leaves_weights_and_state_unchanged(before):
    (bad, good), other = (model(), model()), nn.Parameter(torch.ones(3))
    optimizers = [muon_of(trained, nn.Parameter(torch.ones(3))) for trained in (bad, good)]
    for step in range(before):
        for trained, optimizer in zip((bad, good), optimizers, strict=True):
            give_gradients(list(trained.parameters()), step)
            optimizer.found_inf = torch.zeros(())
            optimizer.step()
    give_gradients([*bad.parameters(), other], 9)
    block_matrices(bad)[0].grad.fill_(torch.nan)
    optimizers[0].found_inf = torch.ones(())
    optimizers[0].step()
    assert all(torch.equal(a, b) for a, b in zip(bad.parameters(), good.parameters(), strict=True))
    for trained, optimizer in zip((bad, good), optimizers, strict=True):
        give_gradients(list(trained.parameters()), 10)
        optimizer.found_inf = torch.zeros(())
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(bad.parameters(), good.parameters(), strict=True))


@pytest.mark.parametrize("shape", [(24, 8), (8, 24)])
def test_float32_orthogonalization_is_torchs_without_its_rounding(shape):
    torch.manual_seed(0)
    gradient = torch.randn(shape)
    constants = (3.4445, -4.7750, 2.0315), 5, 1e-7
    ours = orthogonalize(gradient, *constants)
    theirs = torch.optim._muon._zeropower_via_newtonschulz(gradient, *constants)
    assert ours.dtype == torch.float32 and theirs.dtype == torch.bfloat16
    torch.testing.assert_close(ours, theirs.float(), rtol=0, atol=0.03)
    assert not torch.equal(ours, theirs.float())


@pytest.mark.parametrize(("mixed_precision", "uses_ours"), [("no", True), ("fp16", True), ("bf16", False)])
def test_only_bf16_runs_orthogonalize_in_bf16(mixed_precision, uses_ours, monkeypatch):
    called = []
    monkeypatch.setattr(optimizers, "orthogonalize", lambda gradient, *rest: called.append(1) or gradient)
    theirs = torch.optim._muon._zeropower_via_newtonschulz
    trained = model()
    optimizer = build_optimizer({"model": (list(trained.parameters()), 1.0)}, MUON, trained, mixed_precision)
    give_gradients(list(trained.parameters()), seed=0)
    optimizer.step()
    assert bool(called) is uses_ours
    assert torch.optim._muon._zeropower_via_newtonschulz is theirs


def test_its_state_is_restored():
    ours, theirs = model(), model()
    first, second = (muon_of(trained, nn.Parameter(torch.ones(3))) for trained in (ours, theirs))
    give_gradients(list(ours.parameters()), 0)
    first.step()
    theirs.load_state_dict(ours.state_dict())
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for group in (*first.param_groups, *second.param_groups):
        group["lr"] = 0.003  # as a schedule sets it, before and after
    for trained, optimizer in ((ours, first), (theirs, second)):
        give_gradients(list(trained.parameters()), 1)
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_an_unknown_optimizer_is_one_sentence():
    with pytest.raises(
        UserError, match=r"optim\.name must be one of adamw, muon, or the path of an optimizer class .*, not 'sgd'"
    ):
        build_optimizer(groups(), OptimConfig(name="sgd"))


def test_a_torch_without_muon_is_one_sentence(monkeypatch):
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(UserError, match=r"optim\.name=muon needs torch 2\.9 or newer"):
        build_optimizer(groups(), MUON, model())


# --- Optimizer classes by their path ---------------------------------------------------------------------------------


class ScaledSGD(torch.optim.SGD):
    """Keeps a number of its parameter groups between steps, as Prodigy does."""

    def __init__(self, params, lr: float) -> None:
        super().__init__(params, lr)
        for group in self.param_groups:
            group["factor"] = 1.0

    def step(self, closure: None = None) -> None:
        super().step()
        for group in self.param_groups:
            group["factor"] *= 0.5


PATH = f"{__name__}.ScaledSGD"


def test_a_class_has_its_arguments_and_the_groups_learning_rates():
    config = OptimConfig(
        name="torch.optim.RAdam", learning_rate=0.1, kwargs={"weight_decay": 0.5, "betas": [0.5, 0.6]}
    )
    optimizer = build_optimizer(groups(), config)
    assert isinstance(optimizer, torch.optim.RAdam)
    assert [group["name"] for group in optimizer.param_groups] == ["model", "other"]
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.05]
    assert all((group["weight_decay"], list(group["betas"])) == (0.5, [0.5, 0.6]) for group in optimizer.param_groups)
    scheduler = build_lr_scheduler(optimizer, OptimConfig(lr_scheduler="linear", lr_warmup_steps=0), 10)
    scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.09, 0.045])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "no_such_package.AdamW8bit"}, "the module no_such_package cannot be imported .*install its package"),
        ({"name": "torch.optim.AdamX"}, "the module torch.optim has no optimizer class 'AdamX'"),
        ({"name": "torch.nn.Linear"}, "has no optimizer class 'Linear'"),
        (
            {"name": "torch.optim.RAdam", "kwargs": {"momentum": 1}},
            "not arguments that torch.optim.RAdam accepts: ",
        ),
        ({"name": "torch.optim.RAdam", "kwargs": {"weight_decay": -1}}, "Invalid weight_decay value: -1"),
        ({"name": "torch.optim.RAdam", "kwargs": {"lr": 1}}, "set optim.learning_rate instead"),
        ({"name": "adamw", "kwargs": {"amsgrad": True}}, r"optim\.name=adamw is configured by the keys optim\.adam_"),
    ],
)
def test_a_wrong_class_or_argument_is_one_sentence(settings, message):
    with pytest.raises(UserError, match=message):
        build_optimizer(groups(), OptimConfig(**settings))


def test_the_state_in_a_group_comes_from_the_checkpoint_and_the_settings_from_the_config():
    config = OptimConfig(name=PATH, learning_rate=0.1)
    group = build_optimizer(groups(), config).param_groups[0]
    assert configured_settings(group, config) == {"lr": 0.1}
    group = build_optimizer(groups(), OptimConfig(learning_rate=0.1)).param_groups[0]
    assert {"lr", "betas", "weight_decay"} <= configured_settings(group, OptimConfig()).keys()


def test_a_run_with_a_class_resumes_bit_for_bit(vae_config, tmp_path, monkeypatch):
    settings = [
        f"optim.name={PATH}",
        "data.num_validation_videos=0",
        "train.checkpointing_steps=2",
        "optim.lr_scheduler=constant_with_warmup",
    ]
    train_vae(vae_config(tmp_path / "whole", "train.max_train_steps=4", *settings))
    train_vae(vae_config(tmp_path / "cut", "train.max_train_steps=3", *settings))
    for folder in ("checkpoint-3", "final"):
        shutil.rmtree(tmp_path / "cut" / folder)
    train_vae(vae_config(tmp_path / "cut", "train.max_train_steps=4", "resume=latest", *settings))
    assert_same_run(tmp_path / "whole", tmp_path / "cut")
    saved = torch.load(tmp_path / "cut" / "checkpoint-4" / "optimizer.bin", weights_only=True)
    assert saved["param_groups"][0]["factor"] == 0.5**4


def test_a_class_does_not_step_on_a_value_that_is_not_finite(vae_config, tmp_path, monkeypatch):
    compute = VAETrainer.compute_losses

    def poison(self, batch):
        losses = compute(self, batch)
        if self.updates == 2:
            losses["loss"] = losses["loss"] * float("nan")
        return losses

    settings = ["optim.name=torch.optim.RAdam", "train.logging_steps=5", "data.num_validation_videos=0"]
    train_vae(vae_config(tmp_path / "good", "train.max_train_steps=2", *settings))
    monkeypatch.setattr(VAETrainer, "compute_losses", poison)
    with pytest.raises(TrainingDiverged, match="checkpoint-2 holds the state after the last good step"):
        train_vae(vae_config(tmp_path / "bad", "train.max_train_steps=4", *settings))
    good, bad = (load_file(tmp_path / run / "checkpoint-2" / "model.safetensors") for run in ("good", "bad"))
    assert all(torch.equal(good[name], bad[name]) for name in good)
