"""Files of a model repository on the Hub, fetched by huggingface_hub's own client, or found in its cache."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffusers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFETENSORS_WEIGHTS_NAME
from huggingface_hub import _CACHED_NO_EXIST, constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

# The HTTP library under huggingface_hub changed with its versions; its errors are no OSErrors in all of them.
HTTP_ERRORS = (OSError, *HfHubHTTPError.__bases__)


def read_json(path: Path, where: str) -> dict[str, Any]:
    """The object in a JSON file; a ValueError where there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{where} is not valid JSON: {error}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{where} must hold a JSON object, but holds a {type(content).__name__}.")
    return content


@dataclass(frozen=True)
class Repository:
    """A model repository on the Hub at a revision, or as much of it as the cache has.

    Args:
        repo_id: "user/name".
        revision: branch, tag or commit; None: "main".
        options: further arguments of `hf_hub_download`.
        commit: the commit the revision stands for, once known.
    """

    repo_id: str
    revision: str | None
    options: dict[str, Any] = field(default_factory=dict)
    commit: str | None = None

    def __str__(self) -> str:
        return self.repo_id if self.revision is None else f"{self.repo_id} at {self.revision}"

    def at(self, commit: str) -> Repository:
        """The same, held to one commit: its files belong together even if the repository changes meanwhile."""
        return dataclasses.replace(self, commit=commit)

    def find(self, *filenames: str) -> Path | None:
        """The first of these files that there is, fetched if need be; None if there is none.

        Raises:
            OSError: if that cannot be known or the file not be had.
        """
        unreachable = None
        for filename in filenames:
            if self.is_known_absent(filename):
                continue
            try:
                with hub_errors(self.repo_id, self.revision, filename):
                    return Path(
                        hf_hub_download(self.repo_id, filename, revision=self.commit or self.revision, **self.options)
                    )
            except LocalEntryNotFoundError as error:
                unreachable = unreachable or error
            except EntryNotFoundError:
                continue
        if unreachable is None:
            return None
        missing = " or ".join(filenames)
        if constants.HF_HUB_OFFLINE or self.options.get("local_files_only"):
            cache = self.options.get("cache_dir") or constants.HF_HUB_CACHE
            raise FileNotFoundError(
                f"The cache {cache} has no {missing} of {self}: load it online once, without HF_HUB_OFFLINE or "
                "local_files_only."
            ) from unreachable
        if isinstance(unreachable.__cause__, HfHubHTTPError):
            with hub_errors(self.repo_id, self.revision, missing):
                raise unreachable.__cause__
        raise OSError(
            f"{constants.ENDPOINT} cannot be reached, and the cache has no {missing} of {self}: try again with a "
            "connection."
        ) from unreachable

    def is_known_absent(self, filename: str) -> bool:
        """Whether the cache remembers that this commit has no such file, so that offline it is not missed."""
        if self.commit is None:
            return False
        cached = try_to_load_from_cache(
            self.repo_id, filename, cache_dir=self.options.get("cache_dir"), revision=self.commit
        )
        return cached is _CACHED_NO_EXIST

    def fetch_weights(self, folder: str, variant: str | None) -> str | None:
        """Fetch a model's safetensors, all shards of them; returns the variant they are of.

        Raises:
            FileNotFoundError: if there are none.
            ValueError: if the index of the shards is unreadable, or names files outside the folder.
        """
        for wanted in dict.fromkeys((variant, None)):
            # The order in which Diffusers looks for them.
            names = [with_variant(name, wanted) for name in (SAFE_WEIGHTS_INDEX_NAME, SAFETENSORS_WEIGHTS_NAME)]
            found = self.find(*(f"{folder}/{name}" for name in names))
            if found is None:
                continue
            if found.suffix == ".json":
                self.fetch_shards(folder, found)
            return wanted
        raise FileNotFoundError(f"{self} has no {folder}/{SAFETENSORS_WEIGHTS_NAME}, the weights of its {folder}.")

    def fetch_shards(self, folder: str, index_file: Path) -> None:
        where = f"{folder}/{index_file.name} of {self}"
        weight_map = read_json(index_file, where).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{where} has no weight_map, which says in which file each weight lies.")
        for shard in sorted(set(map(str, weight_map.values()))):
            if Path(shard).name != shard or Path(shard).suffix != ".safetensors":
                raise ValueError(f"{where} names {shard!r}, but shards are .safetensors files beside it.")
            if self.find(f"{folder}/{shard}") is None:
                raise FileNotFoundError(f"{self} has no {folder}/{shard}, which {index_file.name} names.")


def with_variant(filename: str, variant: str | None) -> str:
    """`model.safetensors` -> `model.<variant>.safetensors`."""
    stem, _, suffix = filename.rpartition(".")
    return filename if variant is None else f"{stem}.{variant}.{suffix}"


@contextmanager
def hub_errors(repo_id: str, revision: str | None, what: str) -> Iterator[None]:
    """Say in one sentence what the Hub or the connection to it refuses; a missing file is left to the caller.

    Raises:
        OSError: for a missing repository or revision, a refusal, and a broken connection.
    """
    place = f"{constants.ENDPOINT}/{repo_id}"
    try:
        yield
    except EntryNotFoundError:
        raise
    except GatedRepoError as error:
        raise OSError(
            f"{repo_id} is gated: ask for access at {place}, then log in with `hf auth login` or pass token=."
        ) from error
    except RepositoryNotFoundError as error:
        raise OSError(
            f"{repo_id} is neither a folder here nor a repository at {constants.ENDPOINT}: check the name, or, if the "
            "repository is private, log in with `hf auth login` or pass token=."
        ) from error
    except RevisionNotFoundError as error:
        raise OSError(
            f"{repo_id} has no revision {revision!r}: give a branch, a tag or a commit of {place}."
        ) from error
    except HfHubHTTPError as error:
        raise OSError(
            f"{constants.ENDPOINT} answered HTTP status {error.response.status_code} for {what} of {repo_id}: check "
            "what the token may read, or try again later."
        ) from error
    except HTTP_ERRORS as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the disk's, not the connection's
        raise OSError(
            f"The connection to {constants.ENDPOINT} broke at {what} of {repo_id}: try again; whole files are kept."
        ) from error
