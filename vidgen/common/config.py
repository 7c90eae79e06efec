"""Training configs: typed dataclasses, a YAML file, and dotted overrides on the command line.

    train_vae.py --config configs/vae/paper.yaml data.root=FOLDER train.max_train_steps=1000

Each dataclass is declared beside the code that it configures. One `key(...)` holds a key's default, help, range and
choices; an unknown key is an error that names the nearest known one. Names follow Diffusers' training scripts.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Sequence
from dataclasses import Field, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from .errors import UserError
from .options import expand_home

Config = TypeVar("Config")


def key(
    default: Any,
    help: str,
    *,
    minimum: float | None = None,
    maximum: float | None = None,
    choices: Sequence[Any] = (),
) -> Any:
    """Declare one key of a config dataclass.

    Args:
        default: its value where none is given; `REQUIRED` where one must be.
        help: one sentence for docs/config.md.
        minimum, maximum: the range of a number, both ends included.
        choices: the values it can have, where these are few.
    """
    metadata = {"help": help, "minimum": minimum, "maximum": maximum, "choices": tuple(choices)}
    if callable(default):
        return dataclasses.field(default_factory=default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


REQUIRED = MISSING


class PathConfig:
    """A config with paths: expands the home folder in every text, since only paths begin with `~`."""

    def __post_init__(self) -> None:
        for f in fields(self):
            if isinstance(value := getattr(self, f.name), str):
                setattr(self, f.name, expand_home(value))


def load_config(config_class: type[Config], arguments: Sequence[str]) -> Config:
    """A config from command-line arguments: an optional `--config FILE` and any number of `dotted.key=value`.

    Raises:
        UserError: if the file is missing or malformed, a key is unknown, or a value does not fit its type or is out
            of its range.
    """
    arguments = list(arguments)
    files: list[str] = []
    while "--config" in arguments:
        at = arguments.index("--config")
        if at + 1 >= len(arguments):
            raise UserError("--config wants the path of a YAML recipe after it.")
        files.append(expand_home(arguments[at + 1]))
        del arguments[at : at + 2]
    merged = OmegaConf.structured(config_class)
    for file in files:
        merged = _merge(merged, _read_yaml(file), config_class, where=file)
    for argument in arguments:
        if "=" not in argument or argument.startswith("-"):
            raise UserError(f"{argument!r} is not an override; write key=value, for example data.root=FOLDER.")
        try:
            override = OmegaConf.from_dotlist([argument])
        except Exception as error:
            raise UserError(f"{argument!r} on the command line is not a readable value.") from error
        key, text = argument.split("=", 1)
        if key in _text_keys(config_class) and text not in ("", "null", "None"):
            OmegaConf.update(override, key, text)  # as it was typed: a folder may be called 007, or no
        merged = _merge(merged, override, config_class, where="the command line")
    missing = sorted(OmegaConf.missing_keys(merged))
    if missing:
        raise UserError(f"{missing[0]} is not set; give it as {missing[0]}=... on the command line or in the recipe.")
    _check_values(merged, config_class)
    return OmegaConf.to_object(merged)


def save_config(config: Any, path: str | Path) -> None:
    """The resolved config as YAML that `--config` reads back."""
    Path(path).write_text(OmegaConf.to_yaml(OmegaConf.structured(config)))


def _check_values(config: Any, config_class: type) -> None:
    """Raise a `UserError` for a number that is not finite or out of its range, an empty text, or an unknown choice."""
    known = config_fields(config_class)
    for key, value in _leaves(OmegaConf.to_container(config)):
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{key} must be a finite number, not {value}.")
        if value == "" and key in _text_keys(config_class):
            raise UserError(f"{key} is empty; give it a value, or null where it may have none.")
        limits = known[key].metadata if key in known and value is not None else {}
        if (least := limits.get("minimum")) is not None and value < least:
            raise UserError(f"{key} must be {least} or more, not {value}.")
        if (most := limits.get("maximum")) is not None and value > most:
            raise UserError(f"{key} must be {most} or less, not {value}.")
        if (choices := limits.get("choices")) and value not in choices:
            raise UserError(f"{key} must be one of {', '.join(map(str, choices))}, not {value!r}.")


def _read_yaml(file: str) -> Any:
    if not Path(file).is_file():
        raise UserError(f"No recipe at {file}; --config wants a YAML file such as configs/vae/base.yaml.")
    try:
        content = OmegaConf.load(file)
    except Exception as error:
        raise UserError(f"{file} is not valid YAML: {str(error).splitlines()[0]}.") from error
    if not OmegaConf.is_dict(content):
        raise UserError(f"{file} must hold keys and values, as the recipes in configs/ do.")
    return content


def _merge(config: Any, update: Any, config_class: type, where: str) -> Any:
    known = list(config_fields(config_class))
    for key in _leaf_keys(OmegaConf.to_container(update)):
        if key not in known and not any(key.startswith(f"{open_key}.") for open_key in _open_keys(config_class)):
            nearest = _nearest(key, known)
            raise UserError(f"Unknown key {key!r} in {where}; did you mean {nearest!r}?")
    for key in _text_keys(config_class):
        value = OmegaConf.select(update, key)
        if isinstance(value, bool):  # YAML's own words for these: mixed_precision: no
            OmegaConf.update(update, key, "yes" if value else "no")
    try:
        return OmegaConf.merge(config, update)
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or "a key"
        raise UserError(f"{key} in {where} does not fit: {str(error).splitlines()[0].rstrip('.')}.") from error


def config_fields(config_class: type, prefix: str = "") -> dict[str, Field]:
    """Every field below a config by its dotted key."""
    found: dict[str, Field] = {}
    for f in fields(config_class):
        found[prefix + f.name] = f
        if nested := nested_config(f):
            found |= config_fields(nested, f"{prefix}{f.name}.")
    return found


def _open_keys(config_class: type) -> list[str]:
    """Keys below which anything goes: dictionaries of constructor arguments, which the model itself checks."""
    return [key for key, f in config_fields(config_class).items() if f.default_factory is dict]


def _text_keys(config_class: type) -> list[str]:
    """Keys whose value is text, or text or nothing."""
    return [key for key, f in config_fields(config_class).items() if f.type in ("str", "str | None")]


def nested_config(f: Field) -> type | None:
    default = f.default_factory() if callable(f.default_factory) else None
    return type(default) if is_dataclass(default) else None


def _leaf_keys(container: Any, prefix: str = "") -> list[str]:
    if not isinstance(container, dict) or (prefix and not container):
        return [prefix.rstrip(".")]
    return [leaf for key, value in container.items() for leaf in _leaf_keys(value, f"{prefix}{key}.")]


def _leaves(container: Any, prefix: str = "") -> list[tuple[str, Any]]:
    """Every value below a container of dictionaries and lists, by its dotted key."""
    if isinstance(container, dict):
        items = container.items()
    elif isinstance(container, list):
        items = enumerate(container)
    else:
        return [(prefix.rstrip("."), container)]
    return [leaf for key, value in items for leaf in _leaves(value, f"{prefix}{key}.")]


def _nearest(key: str, known: list[str]) -> str:
    """The known key most like this one: as a whole, or by its last word."""

    def likeness(other: str) -> float:
        whole = difflib.SequenceMatcher(None, key, other).ratio()
        last = difflib.SequenceMatcher(None, key.rsplit(".", 1)[-1], other.rsplit(".", 1)[-1]).ratio()
        return max(whole, 0.99 * last)

    return max(known, key=likeness)
