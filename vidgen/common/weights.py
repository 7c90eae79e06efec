"""Files of other people's weights: found, checked by their hash, and read without running or unpickling anything."""

from __future__ import annotations

import hashlib
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from .errors import UserError


@dataclass(frozen=True)
class WeightsFile:
    """A published file.

    Attributes:
        name: what it is called, and what torch hub's cache keeps it under.
        publisher: whose file it is.
        url: where it can be downloaded.
        size: in bytes, or None where nobody states it.
        sha256: its hash, and then those of other files known to hold the same weights; empty where nobody states it.
        mirrored: where the publisher states no hash, those of copies that others pass on under its name. They may be
            the file or not; no file is refused for having another.
    """

    name: str
    publisher: str
    url: str
    size: int | None
    sha256: tuple[str, ...]
    mirrored: tuple[str, ...] = ()

    @property
    def cached(self) -> Path:
        """Where it is looked for by default: torch hub's cache, `$TORCH_HOME/hub/checkpoints`."""
        return Path(torch.hub.get_dir()) / "checkpoints" / self.name

    def knows(self, sha256: str | None) -> bool:
        """Whether a file of this hash is the published one, or passes for it."""
        return sha256 in (*self.sha256, *self.mirrored)

    def __str__(self) -> str:
        size = f"{self.size} bytes, " if self.size else ""
        sha256 = self.sha256[0] if self.sha256 else "not published: compare with others"
        if self.mirrored and not self.sha256:
            sha256 = f"not published: a mirror's copy has {self.mirrored[0]}"
        return f"{self.url} ({size}sha256 {sha256})"


def check_weights(
    path: Path,
    known: WeightsFile,
    sha256: str | None = None,
    *,
    needed: str,
    path_option: str,
    sha256_option: str,
    otherwise: str = "",
) -> str:
    """The sha256 of a file, after a check that it is the one that is meant.

    Args:
        known: the published file. Where it has hashes, the file must have one of them, unless `sha256` is given.
        sha256: what the user says the file's hash is.
        needed: the first words of the error: "LPIPS needs the ImageNet weights of its vgg backbone".
        path_option, sha256_option: how the user names another file and its hash: "perceptual.weights=".
        otherwise: the last words of the error for a missing file: how to do without it.

    Raises:
        UserError: if there is no such file, or it has another hash.
    """
    if not path.is_file():
        raise UserError(
            f"{needed}, and {path} is no file: save {known} there, or name your copy with {path_option}FILE"
            f"{otherwise}."
        )
    found = file_sha256(path)
    expected = (sha256.lower(),) if sha256 else known.sha256
    if not expected or found in expected:
        return found
    if sha256:
        raise UserError(f"{path} has the sha256 {found}, not {sha256}, which {sha256_option.strip(' =')} asks for.")
    raise UserError(
        f"{path} has the sha256 {found}, so it is not {known.publisher}'s file: save {known} instead, or, if these "
        f"weights are meant all the same, say so with {sha256_option}{found}."
    )


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a .safetensors file, or of a `torch.save` file, by their names, on the CPU.

    Raises `UserError` if the file holds anything else.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it may be a program in TorchScript: then it is refused
            state = torch.load(path, map_location="cpu", weights_only=True)
        if all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
            return state
    except Exception as error:  # a broken file raises nearly anything
        raise UserError(f"{path} cannot be read as tensors by their names ({type(error).__name__}).") from error
    raise UserError(f"{path} holds other things than tensors by their names.")


def file_sha256(path: Path) -> str:
    """The hash of a file's bytes, in hexadecimal digits."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
