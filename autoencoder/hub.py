"""Downloads from the Hugging Face Hub, with one-sentence errors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import constants, errors, snapshot_download

# By type of exception, the first that matches.
MESSAGES: dict[type[Exception], str] = {
    errors.GatedRepoError: "{repo} is gated: request access at {url}, then run `hf auth login` or pass token=.",
    errors.RepositoryNotFoundError: "{repo} is neither a local folder nor a repository at {hub}: check the name or, "
    "for a private repository, run `hf auth login` or pass token=.",
    errors.RevisionNotFoundError: "{repo} has no revision {revision!r}: pass a branch, a tag or a commit of {url}.",
    errors.LocalEntryNotFoundError: "The cache {cache} lacks files of {repo} ({files}), and {hub} was not reached: "
    "load it once with a connection, without HF_HUB_OFFLINE or local_files_only.",
    Exception: "The download of {repo} from {hub} failed ({reason}): check the token, or try again later.",
}


def download(repo_id: str, files: Sequence[str], revision: str | None = None, **options: Any) -> Path:
    """Download files of a Hub repository into the cache, or find them there.

    Args:
        repo_id: "user/name".
        files: names or glob patterns; those that the repository lacks are ignored.
        revision: branch, tag or commit; None: "main".
        options: `token`, `cache_dir`, `local_files_only` and `force_download` of `snapshot_download`.

    Returns:
        The folder of the revision's commit in the cache.

    Raises:
        OSError: if the repository, the revision or the cached files do not exist, or the Hub refuses or fails.
    """
    try:
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=list(files), **options))
    except (OSError, *errors.HfHubHTTPError.__bases__) as error:  # not all HTTP errors are OSErrors
        if isinstance(error, OSError) and error.errno is not None:
            raise  # an error of the disk
        message = next(text for kind, text in MESSAGES.items() if isinstance(error, kind)).format(
            repo=repo_id,
            revision=revision,
            files=", ".join(files),
            hub=constants.ENDPOINT,
            url=f"{constants.ENDPOINT}/{repo_id}",
            cache=options.get("cache_dir") or constants.HF_HUB_CACHE,
            reason=str(error).strip().split("\n")[0],
        )
        raise (FileNotFoundError if isinstance(error, FileNotFoundError) else OSError)(message) from error
