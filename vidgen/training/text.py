"""Text encoders of a DiT's training (`text.encoder`): a frozen one, or one made from the captions of the run."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from accelerate import Accelerator
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, DistilBertConfig, DistilBertModel, PreTrainedTokenizerFast

from pipelines.bag_of_words import BagOfWordsConfig, BagOfWordsModel
from pipelines.text import TextEncoder

from ..common.errors import UserError
from ..common.io import atomic_dir
from ..common.loading import load_text_encoder, text_encoder_hash, tokenizer_hash
from ..data.caption_cache import OWN_ENCODERS, SMALL, WORDS, CaptionCache
from ..data.config import TextConfig
from ..data.latent_cache import LatentCache
from .checkpoints import find_checkpoint
from .config import DiTTrainingConfig
from .pretrained import Parent
from .random_state import keep_random_state
from .word_encoder import END, PAD, fit_word_encoder

FOLDER = "text"  # in the run folder: the tokenizer and the config of the encoder; its weights if it is not trained


def load_frozen_encoder(config: TextConfig, device: torch.device | str) -> TextEncoder | None:
    """Load the frozen text encoder of a config; None for one of the run and for none.

    Its tokenizer cuts at `max_length`, or at the maximum of the encoder if that is smaller.

    Raises:
        UserError: if it cannot be loaded.
    """
    if config.encoder in (None, *OWN_ENCODERS):
        return None
    encoder = load_text_encoder(config.encoder)
    encoder.tokenizer.model_max_length = min(config.max_length, find_max_length(encoder))
    encoder.model.to(device)
    return encoder


def find_max_length(encoder: TextEncoder) -> int:
    """The maximum of tokens of a text encoder: that of its tokenizer, or of its position embeddings if smaller."""
    max_length = encoder.tokenizer.model_max_length  # huge if the tokenizer states none
    positions = getattr(encoder.model.config, "max_position_embeddings", None)
    if positions is None or positions < 1:  # relative positions, as in T5 and XLNet
        return max_length
    # The positions of RoBERTa and its relatives begin after the row for padding.
    table = getattr(getattr(encoder.model, "embeddings", None), "position_embeddings", None)
    padding = getattr(table, "padding_idx", None)
    return min(max_length, positions if padding is None else positions - padding - 1)


def load_encoder(config: DiTTrainingConfig, parent: Parent | None, device: torch.device | str) -> TextEncoder | None:
    """Load the text encoder of a run; None for one that is still to be created, and without captions.

    A frozen one is that of `text.encoder`. A resumed run has that of its run folder; the weights of a small one come
    with the checkpoint. A run from a pipeline with a text encoder keeps that one, and trains a small one further.

    Raises:
        UserError: if it cannot be loaded, its sizes do not fit together, or the encoder of the parent is of another
            class or has other sizes than those that the config sets.
    """
    if config.text.encoder == WORDS:
        return load_word_encoder(config, parent, device)
    if config.text.encoder != SMALL:
        return load_frozen_encoder(config.text, device)
    if (folder := find_saved_encoder(config)) is not None:
        return TextEncoder(
            AutoTokenizer.from_pretrained(folder), DistilBertModel(DistilBertConfig.from_pretrained(folder))
        )
    if parent is not None and parent.text_encoder is not None:
        encoder = load_text_encoder(parent.name)
        if not isinstance(encoder.model, DistilBertModel):
            raise UserError(
                f"text.encoder=small trains a DistilBertModel, but that of {parent.name} is a "
                f"{type(encoder.model).__name__}: set text.encoder={parent.name}, which keeps it frozen."
            )
        encoder.tokenizer.model_max_length = find_max_length(encoder)
        check_parent_sizes(config.text, encoder, parent.name)
        encoder.model.requires_grad_(True)
        return encoder
    if config.text.hidden_size % config.text.num_attention_heads:
        raise UserError(
            f"text.hidden_size={config.text.hidden_size} must be a multiple of text.num_attention_heads="
            f"{config.text.num_attention_heads}."
        )
    return None


def load_word_encoder(
    config: DiTTrainingConfig, parent: Parent | None, device: torch.device | str
) -> TextEncoder | None:
    """Load the word vectors of a resumed run, or of a parent; None for those that are still to be fitted.

    Raises:
        UserError: if those of the run folder cannot be loaded, or the config sets another size than they have.
    """
    folder = find_saved_encoder(config)
    name = str(folder) if folder is not None else parent.name if parent is not None and parent.text_encoder else None
    encoder = None if name is None else load_text_encoder(name)
    if encoder is None or not isinstance(encoder.model, BagOfWordsModel):
        return None
    size, value = encoder.model.config.hidden_size, config.text.hidden_size
    if value not in (size, TextConfig().hidden_size):
        raise UserError(
            f"text.hidden_size is {value}, but the word vectors of {name}, which are kept, have {size}: leave it out, "
            f"or set it to {size}."
        )
    encoder.model.to(device)
    return encoder


def find_saved_encoder(config: DiTTrainingConfig) -> Path | None:
    """The folder of the encoder of the run that is resumed; None for a new run.

    Raises:
        UserError: if the run has another kind of encoder than the config sets.
    """
    folder = Path(config.output_dir) / FOLDER
    is_resumed = find_checkpoint(config.output_dir, config.resume) is not None
    if not is_resumed or not folder.is_dir():
        return None
    kinds = {DistilBertConfig.model_type: SMALL, BagOfWordsConfig.model_type: WORDS}
    kind = kinds.get(json.loads((folder / "config.json").read_text()).get("model_type"))
    if kind != config.text.encoder:
        raise UserError(
            f"The run in {config.output_dir} cannot be resumed, because text.encoder changed from {kind} to "
            f"{config.text.encoder}: choose another output_dir."
        )
    return folder


def prepare_own_encoder(
    config: DiTTrainingConfig, encoder: TextEncoder | None, cache: LatentCache, accelerator: Accelerator
) -> TextEncoder:
    """Create the text encoder of a run from its captions, and write it to the run folder.

    Of a small one, which is trained with the DiT, these are the tokenizer and the config.

    Args:
        config: of the run.
        encoder: from `load_encoder`, which is returned; None for a new one.
        cache: whose captions the tokenizer of a new one is trained on, and whose latents word vectors are fitted to.
        accelerator: of the processes; the main process fits word vectors, and the others read them.

    Raises:
        UserError: if no word is in several captions, for word vectors.
    """
    is_trained, is_new = config.text.encoder == SMALL, encoder is None
    is_saved = find_saved_encoder(config) is not None
    if is_new and is_trained:
        tokenizer = train_tokenizer(cache.captions.texts, config.text.vocab_size)
        tokenizer.model_max_length = config.text.max_length
        encoder = TextEncoder(tokenizer, build_small_model(config.text, tokenizer))
    accelerator.wait_for_everyone()  # every process has looked for a checkpoint
    folder = Path(config.output_dir) / FOLDER
    if accelerator.is_main_process and not is_saved:
        if encoder is None:
            with keep_random_state(accelerator.device):  # the DiT's initialization draws next, in all processes
                encoder = fit_word_encoder(config.text, cache)
        with atomic_dir(folder) as unfinished:
            encoder.tokenizer.save_pretrained(unfinished)
            (encoder.model.config if is_trained else encoder.model).save_pretrained(unfinished)
    accelerator.wait_for_everyone()
    if is_new and not is_trained:
        with keep_random_state(accelerator.device):
            encoder = load_text_encoder(str(folder))
        encoder.model.to(accelerator.device)
    return encoder


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer (Sennrich et al. 2016) on captions; it represents any Unicode text.

    Captions are normalized (NFKC), in lower case, with single blanks, and end with an end token.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Lowercase(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    end = tokenizer.token_to_id(END)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {END}", special_tokens=[(END, end)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=END)


def build_small_model(config: TextConfig, tokenizer: PreTrainedTokenizerFast) -> DistilBertModel:
    """Create a transformer over the tokens of captions, without dropout, newly initialized."""
    return DistilBertModel(
        DistilBertConfig(
            vocab_size=len(tokenizer),
            max_position_embeddings=config.max_length,
            dim=config.hidden_size,
            hidden_dim=4 * config.hidden_size,
            n_layers=config.num_layers,
            n_heads=config.num_attention_heads,
            dropout=0.0,
            attention_dropout=0.0,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def describe_text(encoder: TextEncoder, is_trained: bool, captions: CaptionCache) -> dict[str, str]:
    """Hashes that resuming depends on: of the text encoder, or of the tokenizer of a trained one, and the captions."""
    hashes = {"tokenizer": tokenizer_hash(encoder.tokenizer)}
    if not is_trained:
        hashes = {"text encoder": text_encoder_hash(encoder)}
    return {**hashes, "captions": captions.hash}


def check_text(config: DiTTrainingConfig) -> None:
    """Raise a `UserError` for settings of captions that exclude each other."""
    text = config.text
    if text.encoder is None:
        return
    if text.caption_dropout + 2 * text.stream_dropout > 1:
        raise UserError(
            "text.caption_dropout and twice text.stream_dropout are fractions of the same clips, at most 1 in sum, "
            f"not {text.caption_dropout} and {text.stream_dropout}."
        )
    if text.encoder in OWN_ENCODERS and config.lora.rank:
        raise UserError(
            "lora.rank trains no text encoder; set text.encoder to the folder of a pipeline, such as that of "
            "model.pretrained, which keeps its encoder frozen."
        )


def caption_channels(config: TextConfig, encoder: TextEncoder | None) -> int | None:
    """The size of a token embedding of a run, whose encoder is from `load_encoder`; None without captions."""
    if config.encoder is None:
        return None
    return config.hidden_size if encoder is None else encoder.model.config.hidden_size


def check_parent_sizes(config: TextConfig, encoder: TextEncoder, name: str) -> None:
    """Raise a `UserError` if a config sets a size that the small encoder of a parent, which is kept, does not have.

    Args:
        config: in which a size with the default value counts as not set.
        encoder: of the parent.
        name: of the parent.
    """
    model, default = encoder.model.config, TextConfig()
    sizes = {
        "hidden_size": (model.dim, config.hidden_size == model.dim),
        "num_layers": (model.n_layers, config.num_layers == model.n_layers),
        "num_attention_heads": (model.n_heads, config.num_attention_heads == model.n_heads),
        "vocab_size": (len(encoder.tokenizer), config.vocab_size >= len(encoder.tokenizer)),  # an upper limit
        "max_length": (encoder.tokenizer.model_max_length, config.max_length <= encoder.tokenizer.model_max_length),
    }
    for key, (size, is_equal) in sizes.items():
        value = getattr(config, key)
        if not is_equal and value != getattr(default, key):
            raise UserError(
                f"text.{key} is {value}, but the text encoder of model.pretrained={name}, which is trained further, "
                f"has {size}: leave it out, or set it to {size}."
            )


def check_parent(config: DiTTrainingConfig, parent: Parent, encoder: TextEncoder | None) -> str | None:
    """Compare a run's text encoder with that of its parent; returns a warning if it is another of the same width.

    `encoder` is from `load_encoder`.

    Raises:
        UserError: if the parent was trained on token embeddings of another size, or LoRA meets one without captions.
    """
    channels, width = parent.config.get("caption_channels"), caption_channels(config.text, encoder)
    if channels is None and config.lora.rank:
        raise UserError(
            f"lora.rank trains no attention to captions, which {parent.name} does not have: leave text.encoder out, "
            "or train without LoRA."
        )
    if config.lora.rank and config.model.overrides.get("caption_pooling") and not parent.config.get("caption_pooling"):
        raise UserError(
            f"lora.rank does not train model.overrides.caption_pooling, which {parent.name} does not have: leave it "
            "out, or train without LoRA."
        )
    if channels not in (None, width):
        raise UserError(
            f"model.pretrained={parent.name} was trained on captions of {channels} channels, but the token embeddings "
            f"of text.encoder have {width}: use the text encoder that it was trained with."
        )
    own = None if encoder is None else text_encoder_hash(encoder)
    if config.text.encoder != SMALL and parent.text_encoder not in (None, own):
        return f"text.encoder is not the text encoder that {parent.name} was trained with."
    return None
