"""Precision of a device, of the launcher and of a resumed run; the warning for a slow one."""

import pytest
import torch
from omegaconf import OmegaConf

import vidgen.common.precision as module
from vidgen.common.errors import UserError
from vidgen.common.precision import choose_mixed_precision, resolve_dtype, resolve_mixed_precision


@pytest.fixture
def speedup(monkeypatch):
    """Sets the measured ratio of every half precision, and removes the launcher's wish."""
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    return lambda ratio: monkeypatch.setattr(module, "matmul_speedup", lambda dtype, device: ratio)


@pytest.mark.parametrize(("ratio", "precision", "dtype"), [(2.0, "bf16", torch.bfloat16), (0.1, "no", torch.float32)])
def test_auto_is_bf16_only_where_it_is_fast(speedup, ratio, precision, dtype):
    speedup(ratio)
    choice = resolve_mixed_precision("auto", "cpu")
    assert choice.precision == precision
    assert f"{ratio:.2g} times as fast" in choice.reason
    assert resolve_dtype("auto", "cpu") == dtype


@pytest.mark.parametrize(("has_bf16", "precision"), [(True, "bf16"), (False, "fp16")])
def test_cuda_is_asked_and_not_measured(monkeypatch, has_bf16, precision):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bf16)
    assert choose_mixed_precision("cuda") == (precision, f"Some GPU has {'' if has_bf16 else 'no '}bf16 matrix units")


def test_the_launchers_precision_comes_before_the_devices(speedup, monkeypatch):
    speedup(0.1)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    choice = resolve_mixed_precision("auto", "cpu")
    assert choice.precision == "bf16"
    assert "accelerate launch" in choice.reason and "0.1 times" in choice.reason
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")  # its default
    assert resolve_mixed_precision("auto", "cpu").precision == "no"


def test_an_explicit_slow_precision_is_kept_with_one_line_of_warning(speedup, capsys):
    speedup(0.02)
    choice = resolve_mixed_precision("bf16", "cpu")
    assert choice.precision == "bf16" and "at 0.02 times the rate of float32" in choice.reason
    assert resolve_dtype("bfloat16", "cpu") == torch.bfloat16
    [line] = capsys.readouterr().err.splitlines()
    assert "0.02 times" in line
    assert resolve_dtype("float32", "cpu") == torch.float32
    assert not capsys.readouterr().err


def test_an_unknown_dtype_is_one_sentence():
    with pytest.raises(UserError, match="dtype must be auto, float32, bfloat16, float16; got 'int8'"):
        resolve_dtype("int8", "cpu")


def test_a_resumed_run_keeps_its_precision(tmp_path, speedup):
    from vidgen.common.config import load_config
    from vidgen.training.config import VAETrainingConfig
    from vidgen.training.resume import saved_mixed_precision

    def config(**settings):
        words = [f"{key}={value}" for key, value in settings.items()]
        return load_config(VAETrainingConfig, ["data.root=x", f"output_dir={tmp_path}", *words])

    assert saved_mixed_precision(config(resume="latest")) is None  # nothing to resume yet
    checkpoint = tmp_path / "checkpoint-2"
    checkpoint.mkdir()
    OmegaConf.save({"train": {"mixed_precision": "bf16"}}, checkpoint / "config.yaml")
    assert saved_mixed_precision(config(resume="latest")) == "bf16"
    assert saved_mixed_precision(config(resume=checkpoint)) == "bf16"
    OmegaConf.save({"train": {"mixed_precision": "auto"}}, checkpoint / "config.yaml")
    assert saved_mixed_precision(config(resume="latest")) is None
    speedup(0.1)
    assert module.agree_on_mixed_precision("auto", "bf16").precision == "bf16"
    assert module.agree_on_mixed_precision("auto", None).precision == "no"
    assert module.agree_on_mixed_precision("no", "bf16").precision == "no"
