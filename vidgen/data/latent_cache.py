"""A cache of latents: the posterior of every training clip, encoded once for any number of DiT runs.

A cache is a folder of shards, `latents-00000-of-00040.safetensors` and so on, and `index.json`, written last. A shard
holds a fixed range of the data set's clips, is encoded by one process, and is written atomically. So any number of
processes share the work, an interrupted run resumes with the missing shards, and all give bit-identical files.
"""

from __future__ import annotations

import json
import math
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.utils.data import Dataset

from autoencoder.video_autoencoder import VideoAutoencoder
from pipelines.text import TextEncoder

from ..common.errors import UserError
from ..common.io import atomic_write
from ..common.loading import encoder_hash, weights_hash
from .cache_source import Source, describe_difference
from .caption_cache import OWN_ENCODERS, CaptionCache, prepare_captions
from .config import DataConfig, EncodingConfig, LatentsConfig
from .dataset import BadVideos, ClipDataset, find_classes
from .decoders import describe_fallbacks
from .image_swap import ImageSwap
from .latent_encoding import compute_statistics, encode_clips, split_evenly, sum_latents
from .listing import data_hash, relative_path
from .splits import list_videos_to_encode
from .types import VideoFile

INDEX, BAD_VIDEOS = "index.json", "bad_videos.jsonl"
# Settings of the random changes of a clip that change nothing; caches of earlier versions do not state them.
NO_AUGMENTATION = {"zoom": 1.0, "speed": 1.0, "color": 0.0, "background_swap": 0.0, "motion_classes": []}


class LatentCache(Dataset):
    """The latents of a data set under one VAE, read from disk on access.

    Items are selected by index, or by (epoch, index): the latents are the same in every epoch. An item is a dict:
    `mean` (L,), float32, as encoded (not normalized); with `with_logvar` also `logvar` (L,); `label`, -1 where there
    is none; `index`, its number, for `describe`; in a cache with images also `image` (L_S,), with `image_swap` also
    `shown_image` (L_S,), that or the image of another clip, drawn by (epoch, index); with `captions` also
    `text` and `text_mask` (`CaptionCache.read`) of a caption drawn by (epoch, index). Shards are mapped into memory,
    so a cache may be larger than the memory, and the workers of a loader share the data that was read.

    Attributes:
        classes: class names by id.
        mean, std: of all means, of each stream or each channel, structure first.
        source: everything that the latents depend on.
        bad_videos: (path, reason) of the videos that could not be read.
        captions: those of the videos; None for a DiT without captions.
        image_swap: draws the first frames that are shown; None: those of the clips.
    """

    def __init__(self, folder: str | Path, index: dict[str, Any], with_logvar: bool = False) -> None:
        self.folder = Path(folder)
        self.with_logvar = with_logvar
        self.classes: list[str] = index["classes"]
        self.mean: list[float] = index["mean"]
        self.std: list[float] = index["std"]
        self.source: Source = index["source"]
        self.bad_videos = list(BadVideos(self.folder / BAD_VIDEOS).reasons.items())
        self.captions: CaptionCache | None = None
        self.image_swap: ImageSwap | None = None
        self._videos = index["videos"]
        self._files = [shard["file"] for shard in index["shards"]]
        self._starts = [0, *accumulate(shard["clips"] for shard in index["shards"])]
        self._open: dict[int, dict[str, torch.Tensor]] = {}

    @classmethod
    def load(cls, folder: str | Path, source: Source, with_logvar: bool = False) -> LatentCache | None:
        """The cache in a folder, or None if there is no complete one.

        Raises `UserError` if its source differs from `source`, or it cannot be read.
        """
        folder = Path(folder)
        if not (folder / INDEX).exists():
            return None
        try:
            index = json.loads((folder / INDEX).read_text())
            cached_source = dict(index["source"])
            for shard in index["shards"]:
                if (folder / shard["file"]).stat().st_size != shard["bytes"]:
                    raise ValueError(f"{shard['file']} is cut off")
            cache = cls(folder, index, with_logvar)
        except Exception as error:
            raise UserError(f"The latent cache in {folder} cannot be read ({error}); delete the folder.") from error
        _check_source(folder, cached_source, source)
        return cache

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int | tuple[int, int]) -> dict[str, Any]:
        epoch, index = index if isinstance(index, tuple) else (0, index)
        tensors, row = self._find_row(index)
        video = int(tensors["video"][row])
        label = self._videos[video][1]
        item = {"mean": tensors["mean"][row], "label": -1 if label is None else label, "index": index}
        if "image" in tensors:
            item["image"] = tensors["image"][row]
            if self.image_swap is not None:
                others, other = self._find_row(self.image_swap.draw(epoch, index))
                item["shown_image"] = others["image"][other]
        if self.captions is not None:
            item |= self.captions.sample(video, epoch, index)
        return {**item, "logvar": tensors["logvar"][row]} if self.with_logvar else item

    def swap_images(self, fraction: float, motion_classes: Sequence[str], seed: int) -> None:
        """Show a fraction of the clips the first frames of others, as `ImageSwap` draws them.

        Raises:
            UserError: if a class is unknown.
        """
        videos = []
        for name in self._files:
            with safe_open(self.folder / name, "pt") as file:
                videos += file.get_tensor("video").tolist()
        labels = [self._videos[video][1] for video in videos]
        self.image_swap = ImageSwap(fraction, labels, find_classes(motion_classes, self.classes), seed)

    def measure_statistics(self, vae: VideoAutoencoder, by: str) -> tuple[list[float], list[float]]:
        """Mean and standard deviation of all means, of each part of `split_latents`: stream, channel or query."""
        sums = []
        for name in self._files:
            with safe_open(self.folder / name, "pt") as file:
                sums.append(sum_latents(file.get_tensor("mean"), vae, by))
        return compute_statistics(sums)

    def read_captioned(self, max_clips: int) -> Iterator[tuple[torch.Tensor, str]]:
        """Yield latents (L,) and caption of at most `max_clips` clips, evenly spaced, that have a caption."""
        for index in torch.linspace(0, len(self) - 1, min(max_clips, len(self))).long().tolist():
            tensors, row = self._find_row(index)
            structure, _ = self.captions.draw(int(tensors["video"][row]), 0, index)
            if structure:  # 0 is the empty caption
                yield tensors["mean"][row], self.captions.texts[structure]

    def describe(self, index: int) -> str:
        """The clip of an item: its video's path within the data set, the second it starts at, and if flipped."""
        tensors, row = self._find_row(index)
        path = self._videos[tensors["video"][row]][0]
        return f"{path} from {tensors['start'][row]:.2f} s{', mirrored' if tensors['mirrored'][row] else ''}"

    def _find_row(self, index: int) -> tuple[dict[str, torch.Tensor], int]:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is out of range for {len(self)} clips")
        shard = bisect_right(self._starts, index) - 1
        if shard not in self._open:
            with safe_open(self.folder / self._files[shard], "pt") as file:  # tensors stay on disk until read
                self._open[shard] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return self._open[shard], index - self._starts[shard]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}  # every process maps the files separately


def prepare_cache(
    config: EncodingConfig,
    vae: VideoAutoencoder,
    accelerator: Accelerator,
    num_workers: int = 0,
    text_encoder: TextEncoder | None = None,
) -> LatentCache:
    """Load the latents of the training clips, for all processes; encode them first if the cache is incomplete.

    With `text.encoder` also their captions, before the latents, by `text_encoder` if that is frozen.
    The folder is `latent_cache`, or OUTPUT_DIR/latents. Clips have the size and length of the VAE; precision and
    number of workers are those of the training. Draws nothing from the global generators, so a run that finds its
    cache equals one that makes it.

    Raises:
        UserError: if the data cannot be read or has no caption for `text.encoder`, or the folder holds the latents of
            another VAE or of other data.
    """
    check_latents(config, vae)
    data = config.data
    holds_out = data.hold_out or data.ucf101_split is not None
    if not holds_out and data.num_validation_videos not in (0, DataConfig.num_validation_videos):
        accelerator.print(
            "warning: data.num_validation_videos has no effect here: every video of data.root is encoded for the "
            "DiT; data.hold_out=true holds some out."
        )
    files, _, classes = list_videos_to_encode(data, config.seed, accelerator.print)
    folder = cache_folder(config)
    prepare = (files, classes, config, vae, accelerator, num_workers, text_encoder)
    cache = _prepare(folder, *prepare, needs_captions=True)
    if config.latents.image_swap:
        cache.swap_images(config.latents.image_swap, data.motion_classes, config.seed)
    if cache.captions is not None:
        cache.captions.token_dropout = config.text.token_dropout
    return cache


def prepare_validation_cache(
    config: EncodingConfig,
    vae: VideoAutoencoder,
    accelerator: Accelerator,
    num_workers: int = 0,
    text_encoder: TextEncoder | None = None,
) -> LatentCache | None:
    """Load or encode the latents of the validation clips, as `prepare_cache` does; None without validation videos.

    One center crop from the middle of each video, not flipped. The folder is `validation` in that of the training
    clips. Raises the errors of `prepare_cache`, except that no video needs a caption.
    """
    files, classes = list_videos_to_encode(config.data, config.seed)[1:]
    if not files:
        return None
    root = config.data.validation_root or config.data.root
    config = replace(
        config,
        data=replace(config.data, root=root, clips_per_video=1, **NO_AUGMENTATION),
        latents=replace(config.latents, crops=1, flips=False),
    )
    folder = cache_folder(config) / "validation"
    return _prepare(folder, files, classes, config, vae, accelerator, num_workers, text_encoder)


def cache_folder(config: EncodingConfig) -> Path:
    """The folder of the latents of the training clips."""
    return Path(config.latent_cache or Path(config.output_dir) / "latents")


def _prepare(
    folder: Path,
    files: Sequence[VideoFile],
    classes: Sequence[str],
    config: EncodingConfig,
    vae: VideoAutoencoder,
    accelerator: Accelerator,
    num_workers: int,
    text_encoder: TextEncoder | None,
    needs_captions: bool = False,
) -> LatentCache:
    """Load the latents of these videos from a folder, or encode them into it."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"latent_cache: {folder} is not a folder.")
    source = describe_source(config, vae, files, classes)
    cached = read_cached_source(folder).get("vae")
    if cached not in (None, source["vae"]) and cached == weights_hash(vae):
        source["vae"] = cached  # caches of earlier versions state the hash of the whole model

    # Only one process looks for missing shards: others may already be encoding when a late one looks.
    missing = None
    if accelerator.is_main_process and LatentCache.load(folder, source) is None:
        missing = find_missing_shards(folder, source, config, len(files))
    [missing] = broadcast_object_list([missing])

    # The captions are read before the latents are encoded, so that errors in them are found at once.
    captions = None
    if config.text.encoder is not None:
        frozen = None if config.text.encoder in OWN_ENCODERS else text_encoder
        text = config.text, config.seed, frozen
        captions = prepare_captions(folder, config.data.root, files, *text, accelerator, needs_captions)

    if missing is not None:
        clips = ClipDataset(
            files,
            fps=config.data.fps,
            train=config.latents.crops > 1,
            seed=config.seed,
            clips_per_video=config.data.clips_per_video * config.latents.crops,
            classes=classes,
            decoder=config.data.decoder,
            **augmentation(config.data),
            **clip_settings(vae),
        )
        shards = missing[accelerator.process_index :: accelerator.num_processes]
        with accelerator.autocast():
            fallbacks = encode_shards(
                folder, shards, vae, clips, source, config.latents, accelerator.device, num_workers
            )
        if sentence := describe_fallbacks(config.data.decoder, gather_object(fallbacks), len(files)):
            accelerator.print(sentence)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            write_index(folder, clips, source, vae, config, accelerator.mixed_precision)
        accelerator.wait_for_everyone()
    cache = LatentCache.load(folder, source, with_logvar=config.latents.sample)
    cache.captions = captions
    return cache


def check_latents(config: EncodingConfig, vae: VideoAutoencoder) -> None:
    """Raise a `UserError` for settings that contradict the VAE, or that latents do not depend on."""
    if config.data.flip:
        raise UserError(
            "data.flip flips clips while a VAE is trained, but the DiT is trained on latents that are encoded once: "
            "leave data.flip out, and set latents.flips=true to encode every clip flipped as well."
        )
    for name, value in augmentation(config.data).items():
        if name != "motion_classes" and value != NO_AUGMENTATION[name] and config.latents.crops == 1:
            raise UserError(f"data.{name} changes clips at random, so it needs several: set latents.crops above 1.")
    for name, value in clip_settings(vae).items():
        if getattr(config.data, name) not in (None, value):
            raise UserError(
                f"data.{name} is {getattr(config.data, name)}, but the latents of {config.vae} are those of {value}; "
                f"leave data.{name} out, or train an autoencoder for it."
            )


def augmentation(data: DataConfig) -> dict[str, Any]:
    """The settings of the random changes of a clip, by the names of `NO_AUGMENTATION`."""
    return {name: getattr(data, name) for name in NO_AUGMENTATION}


def clip_settings(vae: VideoAutoencoder) -> dict[str, Any]:
    """The `num_frames` and the `resolution` of a VAE's clips, as in the config of the data."""
    _, frames, height, width = vae.clip_shape
    return {"num_frames": frames, "resolution": height if height == width else [height, width]}


def describe_source(
    config: EncodingConfig, vae: VideoAutoencoder, files: Sequence[VideoFile], classes: Sequence[str]
) -> Source:
    """Everything that latents depend on, by name; a cache is only used with an equal source."""
    return {
        "vae": encoder_hash(vae),
        "data": data_hash(config.data.root, files, classes),
        "fps": config.data.fps,
        **clip_settings(vae),
        "clips_per_video": config.data.clips_per_video,
        "crops": config.latents.crops,
        "flips": config.latents.flips,
        "seed": config.seed if config.latents.crops > 1 else 0,  # only random crops depend on it
        **({"images": True} if config.latents.images else {}),
        **augmentation(config.data),
    }


def read_cached_source(folder: Path) -> Source:
    """The source of a cache, also of an incomplete one; empty if there is none or it cannot be read."""
    try:
        if (folder / INDEX).exists():
            return dict(json.loads((folder / INDEX).read_text())["source"])
        shard = next(iter(sorted(folder.glob("latents-*.safetensors"))), None)
        return {} if shard is None else dict(read_shard_metadata(shard)["source"])
    except (SafetensorError, OSError, KeyError, ValueError, TypeError):
        return {}


def _check_source(folder: Path, cached: Source, source: Source) -> None:
    """Raise a `UserError` that names the first difference between the source of a cache and that of the run."""
    if difference := describe_difference({**NO_AUGMENTATION, **cached}, source):
        raise UserError(
            f"The latent cache in {folder} was made with another {difference}; delete it, or name another folder as "
            "latent_cache."
        )


# --- encoding --------------------------------------------------------------------------------------------------------


def shard_path(folder: Path, shard: int, num_shards: int) -> Path:
    return folder / f"latents-{shard:05d}-of-{num_shards:05d}.safetensors"


def read_shard_metadata(path: Path) -> dict[str, Any]:
    """The `source`, `sums`, number of `clips` and `skipped` videos of a shard."""
    with safe_open(path, "pt") as file:
        return json.loads((file.metadata() or {})["vidgen"])


def find_missing_shards(folder: Path, source: Source, config: EncodingConfig, num_videos: int) -> list[int]:
    """The numbers of the shards that an interrupted run left to encode; all of them in a new folder.

    Damaged and obsolete files are deleted. Raises `UserError` if the existing shards have another source.
    """
    for leftover in folder.glob(".latents-*"):  # of a process that was killed while it wrote
        leftover.unlink(missing_ok=True)
    num_clips = num_videos * config.data.clips_per_video * config.latents.crops
    num_shards = math.ceil(num_clips / config.latents.shard_size)
    present = set()
    for path in sorted(folder.glob("latents-*.safetensors")):
        try:
            cached_source = read_shard_metadata(path)["source"]
        except (SafetensorError, OSError, KeyError, ValueError):
            path.unlink()  # damaged: encoded again
            continue
        _check_source(folder, cached_source, source)
        present.add(path)
    paths = [shard_path(folder, shard, num_shards) for shard in range(num_shards)]
    for path in present.difference(paths):  # of another shard_size
        path.unlink()
    return [shard for shard, path in enumerate(paths) if path not in present]


def encode_shards(
    folder: Path,
    shards: Sequence[int],
    vae: VideoAutoencoder,
    clips: ClipDataset,
    source: Source,
    config: LatentsConfig,
    device: torch.device | str,
    num_workers: int,
) -> list[tuple[str, str]]:
    """Encode and write the shards with these numbers.

    Rows are in the order of the data set; a flipped clip follows the original. A clip that replaces an unreadable one
    is left out, as it also has a row under its regular index. Returns the (path, reason) of videos that PyAV read in
    place of a chosen decoder.
    """
    ranges = split_evenly(range(len(clips)), config.shard_size)
    batches = {shard: split_evenly(ranges[shard], config.batch_size) for shard in shards}
    all_batches = [batch for group in batches.values() for batch in group]
    encoded = encode_clips(vae, clips, device, all_batches, num_workers, config.flips, config.images)
    copies = 2 if config.flips else 1
    fallbacks: list[tuple[str, str]] = []
    for shard in shards:
        rows: dict[str, list[torch.Tensor]] = defaultdict(list)
        skipped: dict[tuple[str, str], None] = {}
        for posterior, batch in islice(encoded, len(batches[shard])):
            numbers = batch["index"] % len(clips.files)
            fields = {
                "mean": posterior.mean.unflatten(0, (copies, -1)).transpose(0, 1),
                "logvar": posterior.logvar.unflatten(0, (copies, -1)).transpose(0, 1),
                **({"image": batch["image"].unflatten(0, (copies, -1)).transpose(0, 1)} if config.images else {}),
                "video": numbers[:, None].expand(-1, copies),
                "start": batch["start"][:, None].expand(-1, copies),
                "mirrored": torch.arange(copies).bool().expand(len(numbers), -1),
            }
            for name, values in fields.items():
                rows[name].append(values[batch["own"]].flatten(0, 1))
            skipped |= dict.fromkeys(batch["skipped"])
            fallbacks += batch["fallbacks"]
        tensors = {name: torch.cat(values).contiguous() for name, values in rows.items()}
        sums = sum_latents(tensors["mean"], vae)
        metadata = {"source": source, "sums": sums, "clips": len(tensors["mean"]), "skipped": list(skipped)}
        with atomic_write(shard_path(folder, shard, len(ranges))) as path:
            save_file(tensors, path, {"vidgen": json.dumps(metadata)})
    list(encoded if shards else ())  # let the progress bar finish
    return fallbacks


def write_index(
    folder: Path,
    clips: ClipDataset,
    source: Source,
    vae: VideoAutoencoder,
    config: EncodingConfig,
    mixed_precision: str,
) -> None:
    """Write `bad_videos.jsonl`, and the index that completes the cache."""
    root = config.data.root
    num_shards = math.ceil(len(clips) / config.latents.shard_size)
    paths = [shard_path(folder, shard, num_shards) for shard in range(num_shards)]
    shards = [read_shard_metadata(path) for path in paths]
    if not sum(shard["clips"] for shard in shards):
        raise UserError(f"No clip of {root} could be read, so there are no latents to train on.")
    mean, std = compute_statistics([shard["sums"] for shard in shards])
    BadVideos(folder / BAD_VIDEOS).add((path, reason) for shard in shards for path, reason in shard["skipped"])
    index = {
        "source": source,
        "made": {"root": str(Path(root).resolve()), "mixed_precision": mixed_precision},
        "structure_shape": list(vae.structure_shape),
        "dynamics_shape": list(vae.dynamics_shape),
        "mean": mean,
        "std": std,
        "classes": list(clips.classes),
        "shards": [
            {"file": path.name, "clips": shard["clips"], "bytes": path.stat().st_size}
            for path, shard in zip(paths, shards, strict=True)
        ],
        "videos": [[relative_path(file.path, root), file.label] for file in clips.files],
    }
    with atomic_write(folder / INDEX) as path:
        path.write_text(json.dumps(index))
