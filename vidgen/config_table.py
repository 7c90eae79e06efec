"""Every key of the recipes in one table, made from `vidgen/config.py`: `make docs` writes it to docs/config.md.

A key's meaning is the comment behind its field.
"""

from __future__ import annotations

import dataclasses
import inspect
import io
import tokenize
from dataclasses import Field
from typing import Any

from .config import DiTTrainingConfig, VAETrainingConfig, config_fields, nested_config

PROGRAMS = {"VAE": VAETrainingConfig, "DiT": DiTTrainingConfig}


def config_table() -> str:
    """The Markdown page of all keys: which program reads them, their type, default and meaning."""
    rows: dict[str, dict[str, Any]] = {}
    for program, config_class in PROGRAMS.items():
        comments = _comments(config_class)
        for key, found in config_fields(config_class).items():
            if nested_config(found) is None:
                row = rows.setdefault(key, {"field": found, "comment": comments[key], "defaults": {}})
                row["defaults"][program] = _default(found)
    lines = [
        "# Every key of a recipe",
        "",
        "Made from `vidgen/config.py` by `make docs`. A recipe is a YAML file of these keys, nested at the dots; on",
        "the command line they are `key=value`. Defaults are of the code; recipes in `configs/` set their own.",
        "",
        "| key | of | type | default | |",
        "|---|---|---|---|---|",
    ]
    for key, row in rows.items():
        defaults = row["defaults"]
        default = next(iter(defaults.values()))
        if len(set(defaults.values())) > 1:
            default = ", ".join(f"{value} ({program})" for program, value in defaults.items())
        kind = str(row["field"].type).replace("|", "or")
        lines.append(f"| `{key}` | {', '.join(defaults)} | {kind} | {default} | {row['comment']} |")
    return "\n".join(lines) + "\n"


def _default(found: Field) -> str:
    value = found.default_factory() if found.default is dataclasses.MISSING else found.default
    return "required" if value == "???" else "" if value is None else f"`{value}`"


def _comments(config_class: type, prefix: str = "") -> dict[str, str]:
    """By dotted key the comment behind each field, and its following lines."""
    source = inspect.getsource(config_class)
    nested = {f.name: nested_config(f) for f in dataclasses.fields(config_class)}
    found: dict[str, str] = {}
    name = None
    tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
    for token, after in zip(tokens, tokens[1:], strict=False):
        if token.type == tokenize.NAME and token.start[1] == 4 and token.string in nested and after.string == ":":
            name = token.string
            found[prefix + name] = ""
        elif token.type == tokenize.COMMENT and name is not None:
            found[prefix + name] = f"{found[prefix + name]} {token.string.lstrip('# ')}".strip()
    for name, inner in nested.items():
        if inner is not None:
            found |= _comments(inner, f"{prefix}{name}.")
    return found


if __name__ == "__main__":
    print(config_table(), end="")
