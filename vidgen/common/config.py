"""Configs of the programs: typed dataclasses, a YAML file, and dotted overrides on the command line.

    train_vae.py --config configs/vae/paper.yaml data.root=FOLDER train.max_train_steps=1000

Each dataclass is declared beside the code that it configures. One `key(...)` holds the default, help, range and
choices of a key. Names follow Diffusers' training scripts.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import operator
from collections.abc import Iterator, Sequence
from dataclasses import Field, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from .errors import UserError
from .options import expand_home

Config = TypeVar("Config")
REQUIRED = MISSING
BOUNDS = {
    "minimum": (operator.ge, "{} or more"),
    "above": (operator.gt, "above {}"),
    "maximum": (operator.le, "{} or less"),
    "below": (operator.lt, "below {}"),
}


# --- Declaration -----------------------------------------------------------------------------------------------------


def key(
    default: Any,
    help: str,
    *,
    minimum: float | None = None,
    above: float | None = None,
    maximum: float | None = None,
    below: float | None = None,
    choices: Sequence[Any] = (),
    pair: bool = False,
) -> Any:
    """Declare one key of a config dataclass.

    Args:
        default: its default value, or a function that creates it; `REQUIRED` if it must be set.
        help: one sentence for docs/config.md.
        minimum, above, maximum, below: the range of a number; `above` and `below` exclude the bound.
        choices: the allowed values, where they are few.
        pair: the value is a whole number or a list of two, each within the range; the type of the field is `Any`.
    """
    bounds = {"minimum": minimum, "above": above, "maximum": maximum, "below": below}
    metadata = {"help": help, "choices": tuple(choices), "pair": pair, **bounds}
    if callable(default):
        return dataclasses.field(default_factory=default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


class PathConfig:
    """A config with paths: expands a leading `~` in every text, since only paths begin with it."""

    def __post_init__(self) -> None:
        for f in fields(self):
            if isinstance(value := getattr(self, f.name), str):
                setattr(self, f.name, expand_home(value))


# --- Loading and saving ----------------------------------------------------------------------------------------------


def load_config(config_class: type[Config], arguments: Sequence[str]) -> Config:
    """Create a config from command-line arguments: `--config FILE`, and any number of `dotted.key=value`.

    The overrides have priority over the file, which has priority over the defaults.

    Raises:
        UserError: if the file is missing or malformed, a key is unknown (the nearest known one is named), or a value
            does not have its type or is out of its range.
    """
    # Merge the files.
    arguments = list(arguments)
    config = OmegaConf.structured(config_class)
    while "--config" in arguments:
        at = arguments.index("--config")
        if at + 1 >= len(arguments):
            raise UserError("--config requires a path to a YAML file.")
        file = expand_home(arguments[at + 1])
        config = _merge(config, _read_yaml(file), config_class, source=file)
        del arguments[at : at + 2]

    # Merge the overrides. Texts are kept as typed: a folder may be called 007, or no.
    for argument in arguments:
        if "=" not in argument or argument.startswith("-"):
            raise UserError(f"{argument!r} is not an override; write key=value, for example data.root=FOLDER.")
        try:
            override = OmegaConf.from_dotlist([argument])
        except Exception as error:
            raise UserError(f"{argument!r} on the command line is not a readable value.") from error
        key, text = argument.split("=", 1)
        if key in _text_keys(config_class) and text not in ("", "null", "None"):
            OmegaConf.update(override, key, text)
        config = _merge(config, override, config_class, source="the command line")

    # Check the result.
    missing = sorted(OmegaConf.missing_keys(config))
    if missing:
        raise UserError(f"{missing[0]} is not set; add {missing[0]}=... on the command line or set it in the config.")
    config = OmegaConf.to_object(config)
    check_config(config)
    return config


def parse_values(arguments: Sequence[str], option: str) -> dict[str, Any]:
    """Parse the `key=value` arguments of a command-line option: values are YAML, and dotted keys make a dict.

    Raises:
        UserError: if an argument has another form.
    """
    for argument in arguments:
        if not argument.partition("=")[1]:
            raise UserError(f"{option} takes key=value, not {argument!r}.")
    try:
        return OmegaConf.to_container(OmegaConf.from_dotlist(list(arguments)), resolve=True)
    except Exception as error:
        raise UserError(f"{option}: {' '.join(arguments)} is not a readable value.") from error


def save_config(config: Any, path: str | Path) -> None:
    """Write a config as YAML that `--config` reads."""
    Path(path).write_text(OmegaConf.to_yaml(OmegaConf.structured(config)))


def check_config(config: Any, name: str = "") -> None:
    """Check the values of a config dataclass against the declarations of its keys.

    Args:
        config: an instance.
        name: the key under which a program's config holds it, for errors.

    Raises:
        UserError: for a number that is not finite or out of range, an empty text, or a value that is no choice.
    """
    prefix = f"{name}." if name else ""
    known = config_fields(type(config), prefix)
    for key, value in config_values(config, prefix).items():
        for part, number in _flatten(value, key):  # also within constructor arguments
            if isinstance(number, float) and not math.isfinite(number):
                raise UserError(f"{part} must be a finite number, not {number}.")
        if value == "":
            raise UserError(f"{key} is empty; set a value, or null where none is needed.")
        metadata = known[key].metadata
        numbers = [] if value is None else [value]
        if numbers and metadata.get("pair"):
            numbers = value if isinstance(value, list) and len(value) == 2 else [value]
            if not all(type(number) is int for number in numbers):
                raise UserError(f"{key} must be a whole number or a list of two, such as [64, 96], not {value!r}.")
        for bound, (is_within, text) in BOUNDS.items():
            if (limit := metadata.get(bound)) is not None and not all(is_within(number, limit) for number in numbers):
                raise UserError(f"{key} must be {text.format(limit)}, not {value}.")
        if value is not None and (choices := metadata.get("choices")) and value not in choices:
            raise UserError(f"{key} must be one of {', '.join(map(str, choices))}, not {value!r}.")


def _read_yaml(file: str) -> Any:
    if not Path(file).is_file():
        raise UserError(f"No config at {file}; --config requires a YAML file such as configs/vae/paper.yaml.")
    try:
        content = OmegaConf.load(file)
    except Exception as error:
        raise UserError(f"{file} is not valid YAML: {str(error).splitlines()[0]}.") from error
    if not OmegaConf.is_dict(content):
        raise UserError(f"{file} must hold keys and values, as the files in configs/ do.")
    return content


def _merge(config: Any, update: Any, config_class: type, source: str) -> Any:
    known = config_fields(config_class)
    open_keys = tuple(f"{key}." for key, f in known.items() if f.default_factory is dict)  # of constructor arguments
    for key, _ in _flatten(OmegaConf.to_container(update), lists=False):
        if key not in known and not key.startswith(open_keys):
            nearest = _find_nearest(key, list(known))
            raise UserError(f"Unknown key {key!r} in {source}; did you mean {nearest!r}?")
    for key in _text_keys(config_class):
        value = OmegaConf.select(update, key)
        if isinstance(value, bool):  # YAML reads `mixed_precision: no` as a boolean
            OmegaConf.update(update, key, "yes" if value else "no")
    try:
        return OmegaConf.merge(config, update)
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or "a key"
        raise UserError(f"{key} in {source} does not fit: {str(error).splitlines()[0].rstrip('.')}.") from error


# --- Keys ------------------------------------------------------------------------------------------------------------


def config_fields(config_class: type, prefix: str = "") -> dict[str, Field]:
    """The fields of a config dataclass and of those nested in it, by dotted key."""
    found: dict[str, Field] = {}
    for f in fields(config_class):
        found[prefix + f.name] = f
        if nested := nested_config(f):
            found |= config_fields(nested, f"{prefix}{f.name}.")
    return found


def config_values(config: Any, prefix: str = "") -> dict[str, Any]:
    """The values of a config by dotted key; a dictionary of constructor arguments is one value."""
    values: dict[str, Any] = {}
    for f in fields(config):
        value = getattr(config, f.name)
        values |= config_values(value, f"{prefix}{f.name}.") if is_dataclass(value) else {prefix + f.name: value}
    return values


def nested_config(f: Field) -> type | None:
    """The dataclass of a field that holds a config."""
    default = f.default_factory() if callable(f.default_factory) else None
    return type(default) if is_dataclass(default) else None


def _text_keys(config_class: type) -> list[str]:
    return [key for key, f in config_fields(config_class).items() if f.type in ("str", "str | None")]


def _flatten(value: Any, key: str = "", lists: bool = True) -> Iterator[tuple[str, Any]]:
    """Every value in nested dictionaries and `lists`, by dotted key; an empty dictionary is a value."""
    if isinstance(value, dict) and (value or not key):
        items = value.items()
    elif isinstance(value, list) and lists:
        items = enumerate(value)
    else:
        yield key, value
        return
    for name, part in items:
        yield from _flatten(part, f"{key}.{name}".lstrip("."), lists)


def _find_nearest(key: str, known: list[str]) -> str:
    """The known key that is most similar to this one, as a whole or by its last word."""

    def similarity(other: str) -> float:
        whole = difflib.SequenceMatcher(None, key, other).ratio()
        last = difflib.SequenceMatcher(None, key.rsplit(".", 1)[-1], other.rsplit(".", 1)[-1]).ratio()
        return max(whole, 0.99 * last)

    return max(known, key=similarity)
