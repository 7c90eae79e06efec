"""Config keys of the data: which videos, how clips are cut from them, and how they are encoded for the DiT."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..common.config import REQUIRED, PathConfig, key


@dataclass
class DataConfig(PathConfig):
    """The videos, and how clips are cut from them."""

    root: str = key(
        REQUIRED,
        "a folder of videos or of one subdirectory per class, a CSV with the columns path,label,caption, or shards",
    )
    validation_root: str | None = key(
        None,
        "validation videos; by default `num_validation_videos` are held out of `root`, for the DiT see `hold_out`",
    )
    num_validation_videos: int = key(8, "videos held out without a validation_root; at most a fifth of all", minimum=0)
    hold_out: bool = key(
        False,
        "DiT only: hold the same videos out of `root` as a VAE's training with the same seed; by default the DiT "
        "trains on all of them",
    )
    ucf101_split: int | None = key(
        None, "train on this official training list of UCF-101, validate on its test list", choices=(1, 2, 3)
    )
    split_files: str | None = key(None, "folder of these lists; by default ucfTrainTestlist in or beside `root`")
    resolution: Any = key(  # noqa: RUF009
        None, "clip size in pixels: a side, or [height, width]; by default of the model's config", minimum=1, pair=True
    )
    num_frames: int | None = key(None, "frames per clip; by default those of the model's config", minimum=1)
    fps: float = key(8.0, "frames per second of a clip, at any frame rate of its file", above=0)
    decoder: str = key(
        "pyav",
        "video decoder; files that decord or torchcodec cannot read exactly are read by PyAV",
        choices=("pyav", "decord", "torchcodec"),
    )
    flip: bool = key(False, "VAE only: flip clips horizontally at random; for the DiT see latents.flips")
    zoom: float = key(
        1.0, "enlarge frames by a random factor from 1 to this before the crop; DiT: with latents.crops", minimum=1
    )
    speed: float = key(1.0, "play clips at a random speed from 1 / this to this; DiT: with latents.crops", minimum=1)
    color: float = key(
        0.0,
        "change contrast, color balance and brightness of a clip at random, by up to this; DiT: with latents.crops",
        minimum=0,
        below=1,
    )
    background_swap: float = key(
        0.0,
        "fraction of clips whose moving parts are put before the background of another video, for a static camera; "
        "DiT: with latents.crops",
        minimum=0,
        maximum=1,
    )
    motion_classes: list[str] = key(  # noqa: RUF009
        list, "classes that are motions, the only ones with background_swap and latents.image_swap; empty: all clips"
    )
    clips_per_video: int = key(1, "clips cut from each video per epoch", minimum=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.resolution, list) and len(self.resolution) == 2 and len(set(self.resolution)) == 1:
            self.resolution = self.resolution[0]  # of square clips: always written as one number


@dataclass
class LatentsConfig:
    """How clips are encoded for the DiT, once (`vidgen.data.latent_cache`), and read back."""

    sample: bool = key(False, "sample from the posterior at every visit; by default its mean, as in the paper")
    statistics: str = key(
        "auto",
        "of the normalization: those that the VAE states, otherwise measured; stream and channel: measured on the "
        "training latents, of each stream or of each channel; response: of each channel, with deviations in "
        "proportion to the effect on the pixels",
        choices=("auto", "stream", "channel", "response"),
    )
    crops: int = key(
        1, "crops per clip: 1 is the center crop; several have random positions and starts, by seed", minimum=1
    )
    flips: bool = key(False, "also encode every clip flipped horizontally")
    images: bool = key(
        False, "also encode the first frame of every clip, for a DiT with model.overrides.image_conditioning"
    )
    image_swap: float = key(
        0.0,
        "fraction of clips of data.motion_classes that are trained with the first frame of another of them, for a DiT "
        "with model.overrides.image_residual",
        minimum=0,
        maximum=1,
    )
    batch_size: int = key(8, "clips encoded at a time", minimum=1)
    shard_size: int = key(256, "clips per file; at most this many are encoded again after an interruption", minimum=1)


@dataclass
class TextConfig(PathConfig):
    """The captions of the clips, and the text encoder whose token embeddings the DiT attends to."""

    encoder: str | None = key(
        None,
        "small: a tokenizer and a transformer trained with the DiT on the captions; words: frozen word vectors fitted "
        "to the latents of the clips, for few captions; or a frozen text encoder of transformers: a folder or Hub "
        "repository of an encoder, or of a pipeline with one; by default no captions",
    )
    max_length: int = key(128, "tokens to which captions are cut", minimum=2)
    caption_dropout: float = key(
        0.1, "fraction of clips trained without a caption, for classifier-free guidance", minimum=0, maximum=1
    )
    stream_dropout: float = key(
        0.1,
        "fraction of clips whose structure alone is trained without the caption, and the same whose dynamics is",
        minimum=0,
        maximum=0.5,
    )
    token_dropout: float = key(
        0.0, "fraction of a caption's tokens hidden in training, never all", minimum=0, maximum=1
    )
    separate_captions: float = key(
        0.0,
        "fraction of clips whose structure and dynamics have captions drawn separately, so that a stream follows only "
        "prompts for that stream; needs data with several captions a clip",
        minimum=0,
        maximum=1,
    )
    batch_size: int = key(64, "captions encoded at a time by a frozen encoder", minimum=1)
    vocab_size: int = key(4096, "small and words: size of the tokenizer's vocabulary, at most", minimum=260)
    hidden_size: int = key(
        256, "small (a multiple of num_attention_heads) and words: size of a token embedding", minimum=1
    )
    num_layers: int = key(3, "small only: number of layers", minimum=1)
    num_attention_heads: int = key(4, "small only: number of attention heads", minimum=1)
    lr_scale: float = key(1.0, "small only: factor on the learning rate", minimum=0)


@dataclass
class EncodingConfig(PathConfig):
    """The keys that the cached latents depend on, and where they are written."""

    vae: str = key(REQUIRED, "folder or Hub repository of a trained VAE")
    output_dir: str = key("runs/dit", "the run folder; created if missing")
    seed: int = key(0, "random seed", minimum=0)
    data: DataConfig = field(default_factory=DataConfig)
    latent_cache: str | None = key(None, "folder of the latent cache; by default OUTPUT_DIR/latents")
    latents: LatentsConfig = field(default_factory=LatentsConfig)
    text: TextConfig = field(default_factory=TextConfig)


def clip_size(config: DataConfig) -> tuple[int | None, int | None, int | None]:
    """The frames, height and width of a config's clips; None where they are those of the model."""
    resolution = config.resolution
    height, width = resolution if isinstance(resolution, list) else (resolution, resolution)
    return (config.num_frames, height, width)
