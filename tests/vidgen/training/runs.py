"""Reading and comparing the files of training runs."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

WEIGHTS = "diffusion_pytorch_model.safetensors"
MEASURED = ("clips_per_second", "data_wait", "tflops", "mfu", "peak_memory_gib", "hours_left")

# All losses that need no file; the GAN is enabled at the third step.
FULL = ["gan.weight=0.05", "gan.start_step=2", "gan.warmup_steps=2", "gan.lecam_weight=0.01"]
FULL += ["gan.channels=8", "gan.num_layers=2"]


def from_parent(parent: Path | str, *settings: str) -> list[str]:
    """Settings of a run that starts from a model instead of a preset."""
    return ["model.preset=null", f"model.pretrained={parent}", *settings]


def logged(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def numbers(run: Path) -> dict[int, dict[str, float]]:
    """The computed values of every logged step, with those of the validation."""
    by_step: dict[int, dict[str, float]] = {}
    for entry in logged(run):
        by_step.setdefault(entry["step"], {}).update({k: v for k, v in entry.items() if k not in MEASURED})
    return by_step


def is_validation(name: str) -> bool:
    return name.startswith("validation/")


def losses(run: Path) -> dict[int, float]:
    return {step: values["loss"] for step, values in numbers(run).items()}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the safetensors files below a folder."""
    found = {}
    for path in sorted(folder.rglob("*.safetensors")):
        found |= {f"{path.relative_to(folder)}:{name}": tensor for name, tensor in load_file(path).items()}
    return found


def assert_same_tensors(a: Path, b: Path) -> None:
    """Bit-identical."""
    ours, theirs = tensors(a), tensors(b)
    assert ours.keys() == theirs.keys() and ours
    different = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert not different


def assert_same_run(a: Path, b: Path) -> None:
    """Two runs have bit-identical logs, final weights and last checkpoints.

    Where one of them was cut, it was validated too: validations are compared at the steps that have one in both.
    """
    ours, theirs = numbers(a), numbers(b)
    validated = [{step for step, values in run.items() if any(map(is_validation, values))} for run in (ours, theirs)]
    both = validated[0] & validated[1]

    def compared(run: dict[int, dict[str, float]]) -> dict[int, dict[str, float]]:
        kept = {
            step: {key: value for key, value in values.items() if step in both or not is_validation(key)}
            for step, values in run.items()
        }
        return {step: values for step, values in kept.items() if set(values) != {"step"}}

    assert compared(ours) == compared(theirs)
    assert_same_tensors(a / "final", b / "final")
    last = max(numbers(a))
    assert_same_tensors(a / f"checkpoint-{last}", b / f"checkpoint-{last}")
    for one, other in zip(*(_optimizer_state(run / f"checkpoint-{last}") for run in (a, b)), strict=True):
        assert all(torch.equal(one[key], other[key]) for key in one)


def _optimizer_state(checkpoint: Path) -> list[dict[str, torch.Tensor]]:
    """The state of every parameter in the optimizer, or in its parts."""
    saved = torch.load(checkpoint / "optimizer.bin", weights_only=True)
    parts = [saved] if "state" in saved else saved.values()
    return [kept for part in parts for kept in part["state"].values()]
