"""Prompts: tokens and embeddings of captions, and the `encode_prompt` of the pipeline.

Structure attends to one prompt and dynamics to another; one prompt serves both by default. An empty prompt is no
prompt: the transformer has a learned token for it.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from diffusers.hooks.group_offloading import _is_group_offload_enabled

from .finite import check_finite_tensor
from .inputs import check_whole_numbers, common_length

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

SHOWN_CHARACTERS = 200  # of a prompt in a message
PROMPT_ARGUMENTS = (  # of the pipeline, with a row per video
    "prompt",
    "negative_prompt",
    "structure_prompt",
    "dynamics_prompt",
    "prompt_embeds",
    "prompt_attention_mask",
    "negative_prompt_embeds",
    "negative_prompt_attention_mask",
)
Prompt = str | Sequence[str] | None


class TextEncoder(NamedTuple):
    """A text encoder of transformers with its tokenizer."""

    tokenizer: PreTrainedTokenizerBase
    model: PreTrainedModel


class CaptionTokens(NamedTuple):
    """Tokens of B captions.

    Attributes:
        ids: (B, N), padded to the longest caption.
        mask: bool (B, N), False for padding, and for all tokens of an empty caption.
        cut: what was cut off the captions longer than the limit, in their order.
    """

    ids: torch.Tensor
    mask: torch.Tensor
    cut: list[str]


class TextConditions(NamedTuple):
    """Embeddings of prompts as inputs of the transformer.

    Attributes:
        embeddings: (B, N, C).
        mask: bool (B, 2, N), the tokens that structure attends to, and those that dynamics attends to.
    """

    embeddings: torch.Tensor
    mask: torch.Tensor

    def repeat(self, count: int, num_videos_per_prompt: int) -> TextConditions:
        """Expand one prompt to `count`, and repeat each `num_videos_per_prompt` times."""
        repeated = (x.expand(count, *x.shape[1:]).repeat_interleave(num_videos_per_prompt, dim=0) for x in self)
        return TextConditions(*repeated)

    def blank(self) -> TextConditions:
        """Conditions of the same shape, without a prompt."""
        return TextConditions(torch.zeros_like(self.embeddings), torch.zeros_like(self.mask))

    def append(self, other: TextConditions) -> TextConditions:
        """The rows of both, padded to equal length."""
        length = max(self.embeddings.shape[1], other.embeddings.shape[1])
        embeddings, masks = [], []
        for part in (self, other):
            padding = length - part.embeddings.shape[1]
            embeddings.append(torch.nn.functional.pad(part.embeddings, (0, 0, 0, padding)))
            masks.append(torch.nn.functional.pad(part.mask, (0, padding)))
        return TextConditions(torch.cat(embeddings), torch.cat(masks))

    def as_inputs(self) -> dict[str, torch.Tensor]:
        """The arguments of the transformer."""
        return {"encoder_hidden_states": self.embeddings, "encoder_attention_mask": self.mask}


def tokenize_captions(
    captions: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_length: int | None = None
) -> CaptionTokens:
    """Tokenize captions; longer ones than `max_length` tokens are cut, by default at the tokenizer's maximum.

    Raises:
        ValueError: if a caption is not valid Unicode, such as a command's argument in another encoding than UTF-8.
    """
    captions = list(captions)
    check_unicode(captions)
    max_length = min(max_length or tokenizer.model_max_length, tokenizer.model_max_length)
    full = tokenizer(captions, verbose=False)["input_ids"]
    cut = [tokenizer.decode(ids[max_length - 1 : -1]) for ids in full if len(ids) > max_length]
    limit = {"truncation": True, "max_length": max_length} if cut else {}
    tokens = tokenizer(captions, padding="longest", return_tensors="pt", **limit)
    has_text = torch.tensor([not is_empty(caption) for caption in captions])
    return CaptionTokens(tokens["input_ids"], tokens["attention_mask"].bool() & has_text[:, None], cut)


def check_unicode(texts: Sequence[str]) -> None:
    """Raise a `ValueError` for a text with surrogates, which are no characters and which tokenizers do not take."""
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"The text {text[:SHOWN_CHARACTERS]!r} is not valid Unicode: its character {error.start + 1} is the "
                f"surrogate {text[error.start]!r}."
            ) from error


def is_empty(caption: str) -> bool:
    """Whether a caption has no visible character, which counts as no caption."""
    return not caption.strip()


def embed_tokens(model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Token embeddings (B, N, C) of a text encoder for `CaptionTokens`; those of padding are arbitrary, but finite."""
    # Attention over no token at all would be NaN, so an empty caption keeps its first token here.
    attended = torch.cat([mask[:, :1] | ~mask.any(dim=1, keepdim=True), mask[:, 1:]], dim=1)
    return model(input_ids=ids, attention_mask=attended.long()).last_hidden_state


def join_streams(embeddings: torch.Tensor, mask: torch.Tensor) -> TextConditions:
    """Conditions with a caption for structure and one for dynamics: embeddings (B, 2, N, C), bool mask (B, 2, N)."""
    own = torch.eye(2, dtype=torch.bool, device=mask.device)[..., None]  # stream, caption, token
    return TextConditions(embeddings.flatten(1, 2), (mask[:, None] & own).flatten(2))


@torch.no_grad()
def encode_captions(
    captions: Sequence[str],
    encoder: TextEncoder,
    max_length: int | None = None,
    device: torch.device | None = None,
) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """Encode captions, each distinct one once.

    Args:
        captions: B texts.
        encoder: the text encoder.
        max_length: tokens to which captions are cut; None: the maximum of the tokenizer.
        device: that an offloaded encoder executes on; None: the device of its weights.

    Returns:
        Embeddings (B, N, C) and mask (B, N) on this device, and the parts that were cut off.
    """
    rows = {caption: row for row, caption in enumerate(dict.fromkeys(captions))}
    tokens = tokenize_captions(list(rows), encoder.tokenizer, max_length)
    device = encoder.model.device if device is None else device
    ids, mask = tokens.ids.to(device), tokens.mask.to(device)
    order = torch.tensor([rows[caption] for caption in captions], device=device)
    return embed_tokens(encoder.model, ids, mask)[order], mask[order], tokens.cut


class PromptMixin:
    """Prompts of a pipeline with the optional components `text_encoder` and `tokenizer`."""

    text_encoder: PreTrainedModel | None
    tokenizer: PreTrainedTokenizerBase | None
    transformer: Any

    @property
    def takes_prompts(self) -> bool:
        """Whether the transformer was trained on captions."""
        return self.transformer.config.get("caption_channels") is not None

    @property
    def _text_encoder_device(self) -> torch.device:
        """The device that the text encoder executes on; its weights are elsewhere while they are offloaded."""
        is_offloaded = hasattr(self.text_encoder, "_hf_hook") or _is_group_offload_enabled(self.text_encoder)
        # Without hooks nothing moves its inputs: a pipeline on an accelerator can keep its text encoder on the CPU.
        return self._execution_device if is_offloaded else self.text_encoder.device

    def encode_prompt(
        self,
        prompt: Prompt = None,
        negative_prompt: Prompt = None,
        do_classifier_free_guidance: bool = True,
        num_videos_per_prompt: int = 1,
        structure_prompt: Prompt = None,
        dynamics_prompt: Prompt = None,
        prompt_embeds: torch.Tensor | None = None,
        prompt_attention_mask: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        negative_prompt_attention_mask: torch.Tensor | None = None,
        max_sequence_length: int | None = None,
        device: torch.device | None = None,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """Encode prompts for the transformer; the results can be passed to the pipeline instead of them.

        Args:
            prompt: of both streams, one or a list.
            negative_prompt: guided away from, one or a list; None: the learned token for "no caption". It has no
                effect without guidance.
            do_classifier_free_guidance: whether to encode negative prompts.
            num_videos_per_prompt: times that each row is repeated.
            structure_prompt, dynamics_prompt: of one stream, in place of `prompt`.
            prompt_embeds: token embeddings (B, N, C) instead of prompts.
            prompt_attention_mask: of these, bool (B, N), or (B, 2, N) with the tokens that structure and those that
                dynamics attends to; None: all.
            negative_prompt_embeds, negative_prompt_attention_mask: the same instead of a negative prompt.
            max_sequence_length: tokens to which prompts are cut; None: the maximum of the tokenizer.
            device: of the results; None: the pipeline's.

        Returns:
            `prompt_embeds` (B, N, C), `prompt_attention_mask` (B, 2, N), `negative_prompt_embeds` (B, N', C) and
            `negative_prompt_attention_mask` (B, 2, N'); None where there is none.

        Raises:
            ValueError: if the model takes no prompts, an argument has a wrong type, shape or length, a prompt is not
                valid Unicode, or embeddings and a prompt are passed at once.
        """
        device = self._execution_device if device is None else device
        texts = {
            "prompt": prompt,
            "structure_prompt": structure_prompt,
            "dynamics_prompt": dynamics_prompt,
            "negative_prompt": negative_prompt,
        }
        texts = {name: _as_prompts(name, text) for name, text in texts.items() if text is not None}
        embeds = {"prompt_embeds": prompt_embeds, "negative_prompt_embeds": negative_prompt_embeds}
        masks = {
            "prompt_embeds": prompt_attention_mask,
            "negative_prompt_embeds": negative_prompt_attention_mask,
        }
        self._check_prompts(texts, embeds, masks)
        if max_sequence_length is not None:
            check_whole_numbers(max_sequence_length=max_sequence_length)
            if max_sequence_length < 1:
                raise ValueError(f"max_sequence_length must be at least 1, not {max_sequence_length}.")

        positive, negative = (
            None if embeds[name] is None else _as_conditions(embeds[name], masks[name]) for name in embeds
        )
        encoded = self._encode_texts(texts, max_sequence_length)
        positive = positive or encoded[0]
        negative = (negative or encoded[1]) if do_classifier_free_guidance else None
        counts = {
            "prompt": None if positive is None else len(positive.mask),
            "negative_prompt": None if negative is None else len(negative.mask),
        }
        count = common_length({name: number for name, number in counts.items() if number is not None})
        results = []
        for conditions in (positive, negative):
            if conditions is None:
                results += [None, None]
                continue
            embeddings, mask = conditions.repeat(count, num_videos_per_prompt)
            results += [embeddings.to(device, self.transformer.dtype), mask.to(device)]
        return tuple(results)

    def prepare_prompts(self, *prompts: Prompt, **options: Any) -> tuple[TextConditions, TextConditions | None] | None:
        """Encode prompts to conditions of the videos, and of the negative prompts where there are any.

        Args:
            prompts, options: arguments of `encode_prompt`.

        Returns:
            Of P prompts each; None without a prompt.
        """
        embeds, mask, negative_embeds, negative_mask = self.encode_prompt(*prompts, **options)
        if embeds is None and negative_embeds is None:
            return None
        negative = None if negative_embeds is None else TextConditions(negative_embeds, negative_mask)
        positive = negative.blank() if embeds is None else TextConditions(embeds, mask)
        return positive, negative

    def get_text_inputs(
        self, prompts: tuple[TextConditions, TextConditions | None] | None, count: int, num_videos_per_prompt: int
    ) -> dict[str, dict[str, torch.Tensor]]:
        """The transformer's inputs for the prompts ("conditional"), the negative ones ("unconditional"), and "both".

        Args:
            prompts: from `prepare_prompts`, one or `count`.
            count: number of classes and prompts.
            num_videos_per_prompt: videos of each.
        """
        if prompts is None:
            return {"conditional": {}, "unconditional": {}, "both": {}}
        positive, negative = (x and x.repeat(count, num_videos_per_prompt) for x in prompts)
        negative = positive.blank() if negative is None else negative
        conditions = {"conditional": positive, "unconditional": negative, "both": positive.append(negative)}
        return {name: text.as_inputs() for name, text in conditions.items()}

    def _check_prompts(self, texts: dict[str, list[str]], embeds: dict[str, Any], masks: dict[str, Any]) -> None:
        given = [*texts, *(name for name, value in embeds.items() if value is not None)]
        for name, value in masks.items():
            if value is not None and embeds[name] is None:
                raise ValueError(f"{name.replace('embeds', 'attention_mask')} requires {name}.")
        if not given:
            return
        if not self.takes_prompts:
            raise ValueError(f"This pipeline's transformer was not trained on captions: leave {given[0]} out.")
        if texts and (self.text_encoder is None or self.tokenizer is None):
            names = "negative_prompt_embeds" if list(texts) == ["negative_prompt"] else "prompt_embeds"
            raise ValueError(f"{next(iter(texts))}: this pipeline has no text_encoder and tokenizer; pass {names}.")
        if embeds["prompt_embeds"] is not None and set(texts) - {"negative_prompt"}:
            raise ValueError(f"{next(iter(texts))} and prompt_embeds exclude each other: pass one of them.")
        if embeds["negative_prompt_embeds"] is not None and "negative_prompt" in texts:
            raise ValueError("negative_prompt and negative_prompt_embeds exclude each other: pass one of them.")
        for name, value in embeds.items():
            if value is not None:
                _check_embeddings(name, value, masks[name], self.transformer.config.caption_channels)

    def _encode_texts(
        self, texts: dict[str, list[str]], max_length: int | None
    ) -> tuple[TextConditions | None, TextConditions | None]:
        """Encode all texts at once: those of the videos, and the negative ones."""
        if not texts:
            return None, None
        count = common_length({name: len(prompts) for name, prompts in texts.items()})
        texts = {name: prompts * count if len(prompts) == 1 else prompts for name, prompts in texts.items()}
        shared = texts.get("prompt", [""] * count)
        structure, dynamics = (texts.get(f"{stream}_prompt", shared) for stream in ("structure", "dynamics"))
        negative = texts.get("negative_prompt", [])
        encoder = TextEncoder(self.tokenizer, self.text_encoder)
        captions, device = [*structure, *dynamics, *negative], self._text_encoder_device
        embeddings, mask, cut = encode_captions(captions, encoder, max_length, device)
        for part in cut:
            logger.warning(
                "A prompt has more than %d tokens, and its end is ignored: %r",
                embeddings.shape[1],
                part[:SHOWN_CHARACTERS],
            )

        embeddings, mask = embeddings.split(count), mask.split(count)
        positive = None
        if structure == dynamics and set(texts) != {"negative_prompt"}:
            positive = _as_conditions(embeddings[0], mask[0])
        elif structure != dynamics:
            positive = join_streams(*(torch.stack(x[:2], dim=1) for x in (embeddings, mask)))
        return positive, _as_conditions(embeddings[2], mask[2]) if negative else None


def _as_prompts(name: str, prompt: Any) -> list[str]:
    """One or several prompts as a list."""
    prompts = [prompt] if isinstance(prompt, str) else prompt
    if not isinstance(prompts, list | tuple):
        raise ValueError(f"{name} must be a text or a list of texts, not {type(prompt).__name__}.")
    for i, text in enumerate(prompts):
        if not isinstance(text, str):
            raise ValueError(f"{name} must be a text or a list of texts, but {name}[{i}] is {text!r:.100}.")
    if not prompts:
        raise ValueError(f"{name} is empty: pass at least one text, or None.")
    return list(prompts)


def _as_conditions(embeddings: torch.Tensor, mask: torch.Tensor | None) -> TextConditions:
    if mask is None:
        mask = torch.ones(embeddings.shape[:2], device=embeddings.device)
    mask = mask.bool()
    return TextConditions(embeddings, mask[:, None].expand(-1, 2, -1) if mask.ndim == 2 else mask)


def _check_embeddings(name: str, embeddings: Any, mask: Any, channels: int) -> None:
    if not isinstance(embeddings, torch.Tensor) or embeddings.ndim != 3 or embeddings.shape[2] != channels:
        found = tuple(embeddings.shape) if isinstance(embeddings, torch.Tensor) else type(embeddings).__name__
        raise ValueError(f"{name} must be a tensor (B, N, {channels}), not {found}.")
    check_finite_tensor(name, embeddings)
    batch, length = embeddings.shape[:2]
    if mask is not None and tuple(mask.shape) not in ((batch, length), (batch, 2, length)):
        name = name.replace("embeds", "attention_mask")
        raise ValueError(f"{name} must be ({batch}, {length}) or ({batch}, 2, {length}), not {tuple(mask.shape)}.")
