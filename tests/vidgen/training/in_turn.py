"""Run trainings in turn in the processes of one launch, because new processes take longest to import.

accelerate launch ... in_turn.py CONFIG [CONFIG ...]

A config that resumes continues the run before it from its second step, as if that had been cut off there.
"""

import sys
from pathlib import Path

from accelerate import PartialState
from accelerate.state import AcceleratorState
from omegaconf import OmegaConf

from vidgen.common.config import load_config
from vidgen.common.errors import run_program
from vidgen.training.config import DiTTrainingConfig, VAETrainingConfig
from vidgen.training.dit_trainer import train_dit
from vidgen.training.vae_trainer import train_vae


def cut_off(whole: Path, cut: Path) -> None:
    """Move the checkpoint of the second step, and copy what was logged before the fifth."""
    cut.mkdir()
    (whole / "checkpoint-2").rename(cut / "checkpoint-2")
    lines = (whole / "metrics.jsonl").read_text().splitlines(True)
    (cut / "metrics.jsonl").write_text("".join(line for line in lines if '"step": 5' not in line))


def main() -> None:
    distributed_type = PartialState(cpu=True).distributed_type
    before = None
    for path in sys.argv[1:]:
        is_vae = "perceptual" in OmegaConf.load(path)
        config = load_config(VAETrainingConfig if is_vae else DiTTrainingConfig, ["--config", path])
        if config.resume and PartialState().is_main_process:
            cut_off(Path(before.output_dir), Path(config.output_dir))
        PartialState().wait_for_everyone()
        (train_vae if is_vae else train_dit)(config)
        AcceleratorState._reset_state()
        PartialState._shared_state["distributed_type"] = distributed_type  # which FSDP changes
        before = config


if __name__ == "__main__":
    run_program(main)
