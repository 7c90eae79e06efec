"""`VidTwinPipeline.from_pretrained("user/name")` without remote code: only JSON and safetensors are downloaded.

Diffusers' own `download` refuses pipelines of classes outside Diffusers unless it may run code of the repository.
"""

from __future__ import annotations

import json
from typing import Any

from autoencoder.adapters import RULES
from autoencoder.hub import download

PACKAGES = ("diffusers", "autoencoder", "pipelines")
TEXT_COMPONENTS = ("text_encoder", "tokenizer")  # of transformers, in their JSON and safetensors formats


class SafeDownloadMixin:
    """The `download` method of a pipeline; it must come before `DiffusionPipeline`."""

    @classmethod
    def download(
        cls, pretrained_model_name: str, revision: str | None = None, variant: str | None = None, **kwargs: Any
    ) -> str:
        """Download a pipeline from the Hub into the cache.

        Args:
            pretrained_model_name: "user/name".
            revision: branch, tag or commit; None: "main".
            variant: of the weights, such as "bf16"; components without this variant have their default weights.
            kwargs: `token`, `cache_dir`, `local_files_only`, `force_download` and the other arguments of
                `from_pretrained`; components among them are not downloaded.

        Returns:
            The folder in the cache.

        Raises:
            ValueError: if the repository holds another pipeline or names a class of another package, or the arguments
                request code or pickles.
            OSError: if the repository, the revision or the pipeline does not exist, or the Hub cannot be reached.
        """
        unsafe = [name for name in ("custom_pipeline", "trust_remote_code", "use_onnx") if kwargs.get(name)]
        unsafe += ["use_safetensors=False"] if kwargs.get("use_safetensors") is False else []
        if unsafe:
            raise ValueError(f"{cls.__name__} loads only JSON and safetensors: leave out {' and '.join(unsafe)}.")
        repo_id, index_name = pretrained_model_name, cls.config_name
        hub_options = ("token", "cache_dir", "local_files_only", "force_download")
        options = {name: kwargs[name] for name in hub_options if kwargs.get(name) is not None}

        # 1. Read the index, which names the class of each component. All other files come from the same commit.
        folder = download(repo_id, [index_name], revision, **options)
        if not (folder / index_name).is_file():
            raise FileNotFoundError(f"{repo_id} holds no pipeline: it has no {index_name}.")
        try:
            index = json.loads((folder / index_name).read_text(encoding="utf-8"))
        except ValueError:
            index = None
        if not isinstance(index, dict) or index.get("_class_name") not in [c.__name__ for c in cls.__mro__]:
            raise ValueError(f"{index_name} of {repo_id} does not describe a {cls.__name__}.")
        components = {name: entry for name, entry in index.items() if isinstance(entry, list) and any(entry)}
        for name, entry in components.items():
            is_allowed = entry[0] == "transformers" and (entry[1] in RULES or name in TEXT_COMPONENTS)
            if str(entry[0]).split(".")[0] not in PACKAGES and not is_allowed:
                raise ValueError(
                    f"{index_name} of {repo_id} loads its {name} from {json.dumps(entry)}, but only classes of "
                    f"{', '.join(PACKAGES)} are loaded from the Hub."
                )
        names = [name for name in cls._get_signature_keys(cls)[0] if name not in kwargs]
        names = [name for name in names if name in components or name not in cls._optional_components]
        for name in names:
            if name not in components:
                raise ValueError(f"{index_name} of {repo_id} has no {name}: pass {name}= to from_pretrained.")

        # 2. Download configs and weights, and default weights for components without the variant.
        weights = [file for name in names for file in weight_files(name, variant)]
        download(repo_id, [*(f"{name}/*.json" for name in names), *weights], folder.name, **options)
        lacking = [n for n in names if not any(any(folder.glob(pattern)) for pattern in weight_files(n, variant))]
        if variant is not None and lacking:
            download(repo_id, [file for name in lacking for file in weight_files(name)], folder.name, **options)
        return str(folder)


def weight_files(component: str, variant: str | None = None) -> list[str]:
    """Return the names of a component's weights file, of Diffusers and of transformers, and patterns of its shards."""
    suffix = f".{variant}" if variant else ""
    stems = [f"{component}/{name}{suffix}" for name in ("diffusion_pytorch_model", "model")]
    return [f"{stem}{ending}" for stem in stems for ending in (".safetensors", "-?????-of-?????.safetensors")]
