"""A pipeline of ours on the Hub: which files it needs, fetched by huggingface_hub's own client.

Diffusers' `DiffusionPipeline.download` refuses a `model_index.json` that names modules outside Diffusers, as ours
does, unless the repository brings code of its own to run. Here no code is fetched, run or even looked for: the modules
are installed already, and beside JSON only safetensors are downloaded.
"""

from __future__ import annotations

import importlib
import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import diffusers

from autoencoder.hub import Repository, read_json

OUR_PACKAGES = ("autoencoder", "pipelines")

logger = logging.getLogger(__name__)


def download_pipeline(
    pipeline_class: type[diffusers.DiffusionPipeline],
    repo_id: str,
    revision: str | None = None,
    variant: str | None = None,
    passed: Iterable[str] = (),
    **options: Any,
) -> str:
    """Fetch what a pipeline needs into the cache: `model_index.json`, and each component's config and safetensors.

    All files are of one commit. What the cache has already is not fetched again; with a warm cache nothing but the
    revision is asked for, and offline nothing at all.

    Args:
        pipeline_class: its constructor's required arguments are the components.
        repo_id: "user/name".
        revision: branch, tag or commit; None: "main".
        variant: weights `diffusion_pytorch_model.<variant>.safetensors`, for the components that have such.
        passed: components that the caller brings along, which are not fetched.
        options: `token`, `cache_dir`, `local_files_only`, `force_download` and `proxies` of `hf_hub_download`.

    Returns:
        The folder in the cache.

    Raises:
        ValueError: if the repository is of another pipeline, or names a class that is neither Diffusers' nor ours.
        FileNotFoundError: if the repository lacks a file.
        OSError: if the repository or revision does not exist or cannot be reached, or the connection breaks.
    """
    repository = Repository(repo_id, revision, options)
    index_file = repository.find(pipeline_class.config_name)
    if index_file is None:
        raise FileNotFoundError(
            f"{repository} has no {pipeline_class.config_name}, so it holds no pipeline; a single model is loaded by "
            "its own class's from_pretrained."
        )
    folder = index_file.parent
    repository = repository.at(folder.name)
    classes = component_classes(pipeline_class, index_file, repository)

    names, _ = pipeline_class._get_signature_keys(pipeline_class)
    missing = set(names) - set(classes) - set(passed)
    if missing:
        raise ValueError(
            f"{pipeline_class.config_name} of {repository} names no {' and no '.join(sorted(missing))}; pass "
            f"{', '.join(f'{name}=' for name in sorted(missing))} to from_pretrained."
        )
    variants = {}
    for name in names:
        if name in passed:
            continue
        config = f"{name}/{classes[name].config_name}"
        if repository.find(config) is None:
            raise FileNotFoundError(f"{repository} has no {config}, which its {name} needs.")
        if issubclass(classes[name], diffusers.ModelMixin):
            variants[name] = repository.fetch_weights(name, variant)
    if variant is not None and variants:
        plain = [name for name, found in variants.items() if found is None]
        if len(plain) == len(variants):
            raise ValueError(f"{repository} has no weights of variant {variant!r} for its {' or '.join(plain)}.")
        if plain:
            logger.warning(
                "%s has no variant %r of its %s: the plain weights are used.", repository, variant, " and ".join(plain)
            )
    return str(folder)


def component_classes(
    pipeline_class: type[diffusers.DiffusionPipeline], index_file: Path, repository: Repository
) -> dict[str, type]:
    """The classes that a `model_index.json` names, by component; nothing is imported but Diffusers and our packages.

    Raises:
        ValueError: if it is unreadable, of another pipeline, or names another class than a model or scheduler there.
    """
    where = f"{index_file.name} of {repository}"
    index = read_json(index_file, where)
    pipeline_name = index.get("_class_name")
    known = [c.__name__ for c in pipeline_class.__mro__ if issubclass(c, diffusers.DiffusionPipeline)]
    if pipeline_name not in known:
        raise ValueError(f"{where} is of a pipeline {pipeline_name!r}, not of a {known[0]}.")
    entries = {name: entry for name, entry in index.items() if isinstance(entry, list) and entry != [None, None]}
    return {name: component_class(name, entry, where) for name, entry in entries.items()}


def component_class(name: str, entry: list, where: str) -> type:
    """The model or scheduler class of a `[module, class]` entry.

    Raises:
        ValueError: if the module is neither Diffusers nor ours, or has no such class.
    """
    module_name, class_name = entry if len(entry) == 2 and all(isinstance(e, str) for e in entry) else ("?", "?")
    if module_name != "diffusers" and module_name.split(".")[0] not in OUR_PACKAGES:
        raise ValueError(
            f"{where} takes its {name} from {json.dumps(entry)}, but only classes of diffusers, "
            f"{' and '.join(OUR_PACKAGES)} are loaded from the Hub."
        )
    try:
        found = getattr(importlib.import_module(module_name), class_name, None)
    except ImportError:
        found = None
    if not (isinstance(found, type) and issubclass(found, diffusers.ModelMixin | diffusers.SchedulerMixin)):
        raise ValueError(
            f"{where} takes its {name} from {module_name}.{class_name}, but the installed {module_name.split('.')[0]} "
            "has no such model or scheduler."
        )
    return found
