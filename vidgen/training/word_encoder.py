"""The text encoder `text.encoder=words`: word vectors fitted in closed form to the latents of the captioned clips.

Canonical correlation analysis between latents and bags of words projects captions to directions that say the most
about the latents. It is linear in the words, so it generalizes to other combinations of words from a few hundred
captions. A DiT learns what all directions say about the captions of its training; of other captions, directions of low
correlation say little, so outside training each direction counts by its correlation.
"""

from __future__ import annotations

import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from pipelines.bag_of_words import BagOfWordsConfig, BagOfWordsModel
from pipelines.text import TextEncoder

from ..common.correlation import correlate
from ..common.errors import UserError
from ..data.config import TextConfig
from ..data.latent_cache import LatentCache
from ..data.words import WORD, bag_words, weigh_words

PAD, UNKNOWN, END = SPECIAL_TOKENS = ("<pad>", "<unk>", "</s>")
MIN_COUNT = 3  # captions with a word of the vocabulary
RIDGE = 10.0  # relative to the mean variance of a latent value, or of a word
MAX_CLIPS = 20_000  # that the vectors are fitted to
MAX_VALUES = 4096  # of a clip; larger latents are sketched


def fit_word_encoder(config: TextConfig, cache: LatentCache) -> TextEncoder:
    """Fit word vectors to the latents and the captions of a cache, at most `MAX_CLIPS` of its clips evenly spaced.

    Raises:
        UserError: if no word is in `MIN_COUNT` different captions.
    """
    weights = weigh_words(cache.captions.texts[1:], MIN_COUNT, config.vocab_size - len(SPECIAL_TOKENS))
    if not weights:
        raise UserError(
            f"text.encoder=words requires words that at least {MIN_COUNT} different captions share, and that not all "
            "do: these captions have none. Set text.encoder=small."
        )
    rows, captions = zip(*((sketch(mean), caption) for mean, caption in cache.read_captioned(MAX_CLIPS)), strict=True)
    latents = torch.stack(rows).double()
    latents = (latents - latents.mean(dim=0)) / latents.std(dim=0).clamp(min=1e-3)
    bags = bag_words(captions, weights)
    centered = bags - bags.mean(dim=0)
    _, vectors = correlate(latents, centered, config.hidden_size, RIDGE)
    deviations = (centered @ vectors).std(dim=0)  # about proportional to the correlation

    # Word i of the vocabulary is token i after the special ones, whose weight is 0.
    tokenizer = build_word_tokenizer(list(weights), config.max_length)
    model = BagOfWordsModel(BagOfWordsConfig(len(tokenizer), config.hidden_size))
    first, dim = len(SPECIAL_TOKENS), vectors.shape[1]
    with torch.no_grad():
        model.word_weights[first:] = torch.tensor(list(weights.values()))
        model.projection.weight.zero_()
        model.projection.weight[:dim, first:] = vectors.T.float()
        model.projection.bias.zero_()
        model.projection.bias[:dim] = -(bags.mean(dim=0) @ vectors).float()
        model.shrinkage[:dim] = (deviations / deviations.max().clamp(min=1e-12)).float()
    return TextEncoder(tokenizer, model.eval())


def sketch(values: torch.Tensor) -> torch.Tensor:
    """The count sketch (Charikar et al. 2002) of more than `MAX_VALUES` values: sums of some with random signs.

    Sketches (MAX_VALUES,) keep inner products on average. Fewer values are returned as they are.
    """
    if len(values) <= MAX_VALUES:
        return values
    generator = torch.Generator().manual_seed(0)
    bucket = torch.randint(MAX_VALUES, (len(values),), generator=generator)
    sign = 2.0 * torch.randint(2, (len(values),), generator=generator) - 1
    return torch.zeros(MAX_VALUES).index_add(0, bucket, sign * values)


def build_word_tokenizer(words: list[str], max_length: int) -> PreTrainedTokenizerFast:
    """Create a tokenizer that splits captions as `split_words` does; other words than these are one unknown token."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*SPECIAL_TOKENS, *words])}, UNKNOWN))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(WORD), "removed", invert=True)
    end = tokenizer.token_to_id(END)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {END}", special_tokens=[(END, end)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, unk_token=UNKNOWN, eos_token=END)
    tokenizer.model_max_length = max_length
    return tokenizer
