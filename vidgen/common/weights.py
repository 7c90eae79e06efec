"""Published files of weights: where they are, checks by hash, and reading without unpickling code."""

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
        name: the file name, also in torch hub's cache.
        publisher: who published it.
        url: where it can be downloaded.
        size: in bytes, if it is published.
        sha256: its hash, and hashes of other files with the same weights; empty if no hash is published.
        mirrored: without a published hash, those of copies of the same name. They may be the file; they are no reason
            to refuse another.
    """

    name: str
    publisher: str
    url: str
    size: int | None
    sha256: tuple[str, ...]
    mirrored: tuple[str, ...] = ()

    @property
    def cached(self) -> Path:
        """Its default path, in torch hub's cache: `$TORCH_HOME/hub/checkpoints`."""
        return Path(torch.hub.get_dir()) / "checkpoints" / self.name

    def knows(self, sha256: str | None) -> bool:
        """Whether a file of this hash is the published one, or a copy of the same name."""
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
    """Check that a file is the expected one; returns its sha256.

    Args:
        known: the published file. If it has hashes, the file must have one of them, unless `sha256` is given.
        sha256: the hash that the user states.
        needed: begin of the error: "LPIPS needs the ImageNet weights of its vgg backbone".
        path_option, sha256_option: options that set another file and its hash: "perceptual.weights=".
        otherwise: end of the error for a missing file: how to work without it.

    Raises:
        UserError: if there is no such file, or it has another hash.
    """
    if not path.is_file():
        raise UserError(
            f"{needed}, and {path} is no file: save {known} there, or set the path of a copy with {path_option}FILE"
            f"{otherwise}."
        )
    found = file_sha256(path)
    expected = (sha256.lower(),) if sha256 else known.sha256
    if not expected or found in expected:
        return found
    if sha256:
        raise UserError(f"{path} has the sha256 {found}, not {sha256}, which {sha256_option.strip(' =')} asks for.")
    raise UserError(
        f"{path} has the sha256 {found}, so it is not {known.publisher}'s file: save {known} instead, or use these "
        f"weights with {sha256_option}{found}."
    )


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Read the tensors of a .safetensors file or a `torch.save` file by name, on the CPU.

    Raises `UserError` if the file holds anything else.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it may be TorchScript, which is refused
            state = torch.load(path, map_location="cpu", weights_only=True)
        if all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
            return state
    except Exception as error:  # a damaged file can raise any error
        raise UserError(f"{path} cannot be read as tensors by their names ({type(error).__name__}).") from error
    raise UserError(f"{path} holds other things than tensors by their names.")


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
