"""docs/config.md is up to date."""

from __future__ import annotations

from pathlib import Path

from vidgen.common.config import config_fields, nested_config
from vidgen.training.config import DiTTrainingConfig, VAETrainingConfig
from vidgen.training.config_table import config_table

PAGE = Path(__file__).parents[3] / "docs" / "config.md"


def test_the_page_is_up_to_date():
    assert PAGE.read_text() == config_table(), "run `make docs`"


def test_every_key_appears_once_with_a_meaning():
    rows = [line.strip("| ").split(" | ") for line in config_table().splitlines() if line.startswith("| `")]
    keys = {
        key
        for config_class in (VAETrainingConfig, DiTTrainingConfig)
        for key, found in config_fields(config_class).items()
        if nested_config(found) is None
    }
    assert sorted(row[0].strip("`") for row in rows) == sorted(keys)
    assert not [row[0] for row in rows if len(row) != 6 or not row[5]]


def test_defaults_that_differ_name_their_program():
    assert "| `runs/vae` (VAE), `runs/dit` (DiT) |" in config_table()
