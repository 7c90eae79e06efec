"""The captions of a latent cache: each distinct one once, with its token embeddings under a frozen text encoder.

`captions.json` beside the latents lists the distinct captions and those of each video, and names the text encoder.
`captions.safetensors` holds the embeddings of a frozen encoder; those of an encoder that is made from the captions of
the run are not kept.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerBase

from pipelines.text import TextEncoder, encode_captions, tokenize_captions

from ..common.errors import UserError
from ..common.io import atomic_write
from ..common.loading import text_encoder_hash
from ..common.progress import progress
from .cache_source import describe_difference
from .captions import Captions, read_captions
from .config import TextConfig
from .types import VideoFile

INDEX, EMBEDDINGS = "captions.json", "captions.safetensors"
OWN_ENCODERS = (SMALL, WORDS) = ("small", "words")  # made from the captions of the run
DOMAIN = 0x43415054  # separates the choice of captions from other random numbers of a sample
TOKEN_DOMAIN = 0x544F4B45  # and that of tokens
DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}  # by mixed precision


class CaptionCache:
    """The captions of a data set's videos, as inputs of the DiT or of a text encoder that is trained with it.

    Attributes:
        texts: the distinct captions; the first is empty.
        token_dropout: fraction of the tokens that `sample` hides, drawn by (seed, epoch, index).
    """

    def __init__(self, folder: Path, index: dict[str, Any], seed: int, separate_captions: float = 0.0) -> None:
        self.folder, self.seed, self.separate_captions = folder, seed, separate_captions
        self.texts: list[str] = index["captions"]
        self.hash: str = index["source"]["captions"]
        self.token_dropout = 0.0
        self._videos: list[list[int]] = index["videos"]
        self._starts: list[int] = index["starts"]
        self._tokens: tuple[torch.Tensor, torch.Tensor] | None = None  # ids and mask of all captions
        self._embeddings: torch.Tensor | None = None  # mapped from disk

    @property
    def is_encoded(self) -> bool:
        """Whether the embeddings of a frozen encoder are kept."""
        return bool(self._starts)

    @property
    def max_tokens(self) -> int:
        """Tokens of the longest caption, to which all are padded."""
        if self.is_encoded:
            return max(np.diff(self._starts).max(), 1)
        return self._tokens[0].shape[1]

    @property
    def tokens_per_clip(self) -> int:
        """Tokens of the captions of a clip with padding."""
        return self.max_tokens * (2 if self.separate_captions else 1)

    def tokenize(self, tokenizer: PreTrainedTokenizerBase, max_length: int) -> int:
        """Tokenize all captions for an encoder of the run; returns how many are cut."""
        ids, mask, cut = tokenize_captions(self.texts, tokenizer, max_length)
        self._tokens = ids, mask
        return len(cut)

    def examples(self, count: int) -> list[str]:
        """At most `count` captions that are not empty, evenly spaced among the distinct ones."""
        numbers = np.linspace(1, len(self.texts) - 1, min(count, len(self.texts) - 1)).round().astype(int)
        return [self.texts[number] for number in numbers]

    def draw(self, video: int, epoch: int, index: int) -> tuple[int, int]:
        """The numbers of the captions of a video's structure and dynamics, drawn by (seed, epoch, index).

        They are equal, except for a fraction `separate_captions`; 0, the empty caption, for a video without any.
        """
        numbers = self._videos[video] or [0]
        rng = np.random.default_rng([self.seed, epoch, index, DOMAIN])
        structure = numbers[rng.integers(len(numbers))]
        is_separate = rng.random() < self.separate_captions
        return structure, numbers[rng.integers(len(numbers))] if is_separate else structure

    def sample(self, video: int, epoch: int, index: int) -> dict[str, torch.Tensor]:
        """The drawn caption of a video, as `read` returns it; with `separate_captions` those of both streams stacked.

        The tensors are then `text` (2, N) or (2, N, C), and `text_mask` (2, N).
        """
        structure, dynamics = self.draw(video, epoch, index)
        rng = np.random.default_rng([self.seed, epoch, index, TOKEN_DOMAIN])
        captions = [self._hide_tokens(self.read(structure), rng)]
        if not self.separate_captions:
            return captions[0]
        captions += [captions[0] if dynamics == structure else self._hide_tokens(self.read(dynamics), rng)]
        return {name: torch.stack([caption[name] for caption in captions]) for name in captions[0]}

    def _hide_tokens(self, caption: dict[str, torch.Tensor], rng: np.random.Generator) -> dict[str, torch.Tensor]:
        """The caption with some of its tokens masked, but never all."""
        shown = caption["text_mask"] & torch.from_numpy(rng.random(self.max_tokens) >= self.token_dropout)
        return {**caption, "text_mask": shown if shown.any() else caption["text_mask"]}

    def read(self, number: int) -> dict[str, torch.Tensor]:
        """A caption as `text`, token ids (N,) or embeddings (N, C), and bool `text_mask` (N,); N is `max_tokens`."""
        if not self.is_encoded:
            ids, mask = self._tokens
            return {"text": ids[number], "text_mask": mask[number]}
        if self._embeddings is None:
            with safe_open(self.folder / EMBEDDINGS, "pt") as file:
                self._embeddings = file.get_tensor("embeddings")
        start, end = self._starts[number : number + 2]
        padding = self.max_tokens - (end - start)
        embeddings = F.pad(self._embeddings[start:end].float(), (0, 0, 0, padding))
        return {"text": embeddings, "text_mask": torch.arange(self.max_tokens) < end - start}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_embeddings": None}  # every process maps the file separately


def prepare_captions(
    folder: Path,
    root: str,
    files: Sequence[VideoFile],
    config: TextConfig,
    seed: int,
    encoder: TextEncoder | None,
    accelerator: Accelerator,
    required: bool = True,
) -> CaptionCache:
    """Load the captions of a latent cache, for all processes; read and encode them first if there are none.

    Args:
        folder: of the latent cache.
        root, files: the data set, and its videos in the order of the cache.
        config: of the text.
        seed: of the choice among several captions.
        encoder: frozen; None for one that is trained with the DiT.
        accelerator: of the processes; the main process encodes, in the precision of the training.
        required: whether the data set must have a caption, as that of a training.

    Raises:
        UserError: if the folder holds captions for another encoder or of other data, or a required caption is missing.
    """
    if accelerator.is_main_process:
        captions = read_captions(root, files)
        if required and not any(text for video in captions for text in video):
            raise UserError(
                f"text.encoder is set, but no video of {root} has a caption: add a column caption to the CSV, a .txt "
                "beside each video, or leave text.encoder out."
            )
        source = describe_source(captions, config, encoder)
        index = _read_index(folder)
        if index is None:
            _write(folder, captions, source, config, encoder, accelerator)
        else:
            _check_source(folder, index["source"], source)
    accelerator.wait_for_everyone()
    return CaptionCache(folder, _read_index(folder), seed, config.separate_captions)


def describe_source(captions: Sequence[Captions], config: TextConfig, encoder: TextEncoder | None) -> dict[str, Any]:
    """Everything that the cached captions depend on."""
    digest = hashlib.sha256(json.dumps(captions).encode()).hexdigest()
    if encoder is None:
        return {"text encoder": SMALL, "captions": digest}
    return {"text encoder": text_encoder_hash(encoder), "text.max_length": config.max_length, "captions": digest}


def _write(
    folder: Path,
    captions: Sequence[Captions],
    source: dict[str, Any],
    config: TextConfig,
    encoder: TextEncoder | None,
    accelerator: Accelerator,
) -> None:
    texts = list(dict.fromkeys(["", *(text for video in captions for text in video)]))
    starts: list[int] = []
    if encoder is not None:
        with accelerator.autocast():
            embeddings, lengths = encode_distinct(texts, encoder, config, accelerator)
        starts = [0, *accumulate(lengths)]
        with atomic_write(folder / EMBEDDINGS) as path:
            save_file({"embeddings": embeddings}, path)
    numbers = {text: number for number, text in enumerate(texts)}
    videos = [[numbers[text] for text in video] for video in captions]
    with atomic_write(folder / INDEX) as path:
        path.write_text(json.dumps({"source": source, "captions": texts, "starts": starts, "videos": videos}))


def encode_distinct(
    texts: Sequence[str], encoder: TextEncoder, config: TextConfig, accelerator: Accelerator
) -> tuple[torch.Tensor, list[int]]:
    """The embeddings (sum of N, C) of captions without padding, and the number of tokens N of each."""
    rows, lengths, num_cut = [], [], 0
    for start in progress(range(0, len(texts), config.batch_size), "encoding captions"):
        embeddings, mask, cut = encode_captions(texts[start : start + config.batch_size], encoder, config.max_length)
        if not embeddings[mask].isfinite().all():
            raise UserError(f"The text encoder {config.encoder} produced NaN or infinite values.")
        rows.append(embeddings[mask].to("cpu", DTYPES.get(accelerator.mixed_precision, torch.float32)))
        lengths += mask.sum(dim=1).tolist()
        num_cut += len(cut)
    if num_cut:
        accelerator.print(warn_of_cut(num_cut, len(texts) - 1, config, encoder.tokenizer))
    return torch.cat(rows), lengths


def warn_of_cut(num_cut: int, total: int, config: TextConfig, tokenizer: PreTrainedTokenizerBase) -> str:
    """A warning that captions are cut, which names the limit that applies: of the config or of the tokenizer."""
    limit = f"text.max_length={config.max_length} tokens"
    if tokenizer.model_max_length < config.max_length:
        limit = f"{tokenizer.model_max_length} tokens, the maximum of the text encoder"
    return f"warning: {num_cut:,} of {total:,} captions are cut at {limit}."


def _read_index(folder: Path) -> dict[str, Any] | None:
    if not (folder / INDEX).exists():
        return None
    try:
        index = json.loads((folder / INDEX).read_text())
        if index["starts"]:
            with safe_open(folder / EMBEDDINGS, "pt") as file:
                if file.get_slice("embeddings").get_shape()[0] != index["starts"][-1]:
                    raise ValueError(f"{EMBEDDINGS} is that of other captions")
        return index
    except Exception as error:
        raise UserError(
            f"The captions in {folder} cannot be read ({error}); delete {INDEX} and {EMBEDDINGS} there."
        ) from error


def _check_source(folder: Path, cached: dict[str, Any], source: dict[str, Any]) -> None:
    """Raise a `UserError` that names the first difference between cached captions and those of the run."""
    if difference := describe_difference(cached, source):
        raise UserError(
            f"The captions in {folder} are cached for another {difference}; delete {INDEX} and {EMBEDDINGS} there, "
            "which keeps the latents, or name another folder as latent_cache."
        )
