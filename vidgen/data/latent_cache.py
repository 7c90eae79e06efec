"""Clips encoded once: the posterior of every training clip, kept on disk for any number of DiT runs.

A cache is a folder of shards, `latents-00000-of-00040.safetensors` and so on, and `index.json`, written last. A shard
holds a fixed range of the data set's clips, is encoded by one process and appears whole or not at all. So any number
of processes share the work, a killed run goes on with the shards that are missing, and all end with the same bits.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.utils.data import DataLoader, Dataset

from autoencoder import AutoencoderKLVidTwin, TwinPosterior
from pipelines.finite import non_finite_message

from ..common.errors import UserError
from ..common.io import atomic_write
from ..common.loading import weights_hash
from ..common.progress import progress
from .config import DataConfig, EncodingConfig, LatentsConfig
from .dataset import BadVideos, ClipDataset, collate_clips
from .decoders import describe_fallbacks
from .splits import list_training_videos
from .types import ShardMember, VideoFile

INDEX, BAD_VIDEOS = "index.json", "bad_videos.jsonl"
Source = dict[str, str | int | float | bool]


def prepare_cache(
    config: EncodingConfig, vae: AutoencoderKLVidTwin, accelerator: Accelerator, num_workers: int = 0
) -> LatentCache:
    """The latents of a recipe's clips, for all processes: from the cache folder, else encoded by all of them and kept.

    The folder is `latent_cache`, or OUTPUT_DIR/latents. Clips have the autoencoder's size and length; precision and
    workers are the training's. Draws nothing from the global generators, so a run that finds its cache equals one
    that makes it.

    Raises:
        UserError: if the data cannot be had, or the folder holds the latents of another autoencoder or other data.
    """
    check_latents(config, vae)
    for key in keys_without_effect(config.data):
        accelerator.print(f"warning: {key} has no effect here: every video of data.root is encoded for the DiT.")
    folder = Path(config.latent_cache or Path(config.output_dir) / "latents")
    files, classes = list_training_videos(config.data, accelerator.print)
    source = cache_source(config, vae, files, classes)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"latent_cache: {folder} is no folder.")
    missing = None
    if accelerator.is_main_process and LatentCache.load(folder, source) is None:
        missing = missing_shards(folder, source, config, len(files))
    [missing] = broadcast_object_list([missing])  # one alone looks: others may be at work by the time a late one does
    if missing is not None:
        random = config.latents.crops > 1
        clips = ClipDataset(
            files,
            num_frames=vae.config.num_frames,
            fps=config.data.fps,
            resolution=vae.config.sample_size,
            train=random,
            seed=config.seed,
            clips_per_video=clips_per_video(config),
            classes=classes,
            decoder=config.data.decoder,
        )
        mine = missing[accelerator.process_index :: accelerator.num_processes]
        with accelerator.autocast():
            fallbacks = encode_shards(
                folder,
                mine,
                vae,
                clips,
                source,
                config.latents,
                accelerator.device,
                num_workers,
            )
        if sentence := describe_fallbacks(config.data.decoder, gather_object(fallbacks), len(files)):
            accelerator.print(sentence)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            write_index(folder, clips, source, vae, config, accelerator.mixed_precision)
        accelerator.wait_for_everyone()
    return LatentCache.load(folder, source, with_logvar=config.latents.sample)


def check_latents(config: EncodingConfig, vae: AutoencoderKLVidTwin) -> None:
    """Raise a `UserError` for a setting that is not the autoencoder's, or that latents do not depend on."""
    if config.data.flip:
        raise UserError(
            "data.flip mirrors clips while a VAE is trained, but the DiT is trained on latents that are encoded once: "
            "leave data.flip out, and set latents.flips=true to encode every clip mirrored as well."
        )
    for name, own in {"resolution": vae.config.sample_size, "num_frames": vae.config.num_frames}.items():
        if getattr(config.data, name) not in (None, own):
            raise UserError(
                f"data.{name} is {getattr(config.data, name)}, but the latents of {config.vae} are those of {own}; "
                f"leave data.{name} out, or train an autoencoder for it."
            )


def keys_without_effect(data: DataConfig) -> list[str]:
    """The keys of `data` that were set and that latents do not depend on: nothing is held out for validation."""
    keys = ["data.validation_root"] if data.validation_root is not None else []
    if data.num_validation_videos not in (0, DataConfig.num_validation_videos):
        keys.append("data.num_validation_videos")
    return keys


def clips_per_video(config: EncodingConfig) -> int:
    """Clips cut from each video: evenly spaced from the middle of the frame, or `latents.crops` as many at random."""
    return config.data.clips_per_video * config.latents.crops


# --- what a cache was made from -------------------------------------------------------------------------------------


def cache_source(
    config: EncodingConfig, vae: AutoencoderKLVidTwin, files: Sequence[VideoFile], classes: Sequence[str]
) -> Source:
    """All that latents depend on, by name; a cache is only used with the same."""
    return {
        "vae": weights_hash(vae),
        "data": data_hash(config.data.root, files, classes),
        "fps": config.data.fps,
        "num_frames": vae.config.num_frames,
        "resolution": vae.config.sample_size,
        "clips_per_video": config.data.clips_per_video,
        "crops": config.latents.crops,
        "flips": config.latents.flips,
        "seed": config.seed if config.latents.crops > 1 else 0,  # nothing else is drawn
    }


def data_hash(root: str | os.PathLike, files: Sequence[VideoFile], classes: Sequence[str]) -> str:
    """SHA-256 over every video's path within `root`, size, modification time in seconds and class, in order.

    Names and times, not contents, so that it takes moments: a data set moved with its times (mv, rsync -a, tar) is the
    same one, and a video that was written anew makes another.
    """
    digest = hashlib.sha256()
    for path, label in files:
        in_shard = isinstance(path, ShardMember)
        try:
            status = os.stat(path.shard if in_shard else path)
            size, changed = path.size if in_shard else status.st_size, int(status.st_mtime)
        except OSError:  # listed but absent: encoding will say so
            size, changed = -1, -1
        line = [relative_path(path, root), size, changed, None if label is None else classes[label]]
        digest.update(json.dumps(line).encode() + b"\n")
    return digest.hexdigest()


def relative_path(path: Path | ShardMember, root: str | os.PathLike) -> str:
    """A video's path within its data set: below the folder, or below the folder of the CSV or the shards."""
    if isinstance(path, ShardMember):
        return f"{relative_path(path.shard, root)}/{path.name}"
    base = Path(root) if Path(root).is_dir() else Path(root).parent
    return path.relative_to(base).as_posix() if path.is_relative_to(base) else path.as_posix()


def refuse_another(folder: Path, made_from: Source, source: Source) -> None:
    """Raise a `UserError` that names the first thing in which a cache's source differs from the run's."""
    for key, value in source.items():
        if made_from.get(key) != value:
            was, now = (str(x)[:12] for x in (made_from.get(key), value))
            raise UserError(
                f"The latent cache in {folder} was made with another {key} ({was}, now {now}); delete it, or name "
                "another folder as latent_cache."
            )


# --- encoding -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def encode_clips(
    vae: AutoencoderKLVidTwin,
    clips: ClipDataset,
    device: torch.device | str,
    batches: Sequence[Sequence[int]],
    num_workers: int = 0,
    flips: bool = False,
) -> Iterator[tuple[TwinPosterior, dict[str, Any]]]:
    """Batches of a data set's clips, by their indices, with the posterior, over (b, L), float32, on the CPU.

    With `flips` every clip is also encoded mirrored: the posterior is over (2 b, L), the mirrored ones last.

    Raises:
        UserError: if the latents of a clip are not finite.
    """
    loader = DataLoader(
        clips,
        batch_sampler=batches,
        num_workers=num_workers,
        collate_fn=collate_clips,
        pin_memory=torch.device(device).type == "cuda",
        generator=torch.Generator(),  # its own: reading would else draw from the one that training draws from
    )
    for batch in progress(loader, "encoding"):
        video = batch["video"].to(device, vae.dtype, non_blocking=True)
        if flips:
            video = torch.cat([video, video.flip(-1)])
        encoded = vae.encode(video).latent_dist
        posterior = TwinPosterior(encoded.mean.float().cpu(), encoded.logvar.float().cpu())
        if not (posterior.mean.isfinite().all() and posterior.logvar.isfinite().all()):
            message = non_finite_message("the autoencoder", vae)
            raise UserError(f"{message} (train.mixed_precision) The clips are of {', '.join(batch['path'])}.")
        yield posterior, batch


def split_evenly(indices: range, size: int) -> list[range]:
    """Consecutive ranges of `size` indices; the last may be shorter."""
    return [indices[start : start + size] for start in range(0, len(indices), size)]


def shard_path(folder: Path, shard: int, shards: int) -> Path:
    return folder / f"latents-{shard:05d}-of-{shards:05d}.safetensors"


def missing_shards(folder: Path, source: Source, config: EncodingConfig, num_videos: int) -> list[int]:
    """The shards that an interrupted run left to do; all of them in a new folder.

    Raises:
        UserError: if the shards that are there were made from something else.
    """
    for leftover in folder.glob(".latents-*"):  # of a process that was killed while it wrote
        leftover.unlink(missing_ok=True)
    shards = math.ceil(num_videos * clips_per_video(config) / config.latents.shard_size)
    present = set()
    for path in sorted(folder.glob("latents-*.safetensors")):
        try:
            made_from = read_shard(path)["source"]
        except (SafetensorError, OSError, KeyError, ValueError):
            path.unlink()  # damaged: done over
            continue
        refuse_another(folder, made_from, source)
        present.add(path)
    ours = [shard_path(folder, shard, shards) for shard in range(shards)]
    for path in present.difference(ours):  # cut for another shard_size
        path.unlink()
    return [shard for shard, path in enumerate(ours) if path not in present]


def encode_shards(
    folder: Path,
    mine: Sequence[int],
    vae: AutoencoderKLVidTwin,
    clips: ClipDataset,
    source: Source,
    config: LatentsConfig,
    device: torch.device | str,
    num_workers: int,
) -> list[tuple[str, str]]:
    """Encode and write some of a cache's shards, by number.

    Rows stand in the order of the data set, a clip's mirror image right after it. A clip that stands in for an
    unreadable one is left out: it has a row of its own. Returns the (path, reason) of videos that PyAV read in place
    of a chosen decoder.
    """
    ranges = split_evenly(range(len(clips)), config.shard_size)
    batches = [batch for shard in mine for batch in split_evenly(ranges[shard], config.batch_size)]
    rows: dict[str, list[torch.Tensor]] = {}
    skipped: list[tuple[str, str]] = []
    fallbacks: list[tuple[str, str]] = []
    todo = iter(mine)
    shard = next(todo, None)
    encoded = encode_clips(vae, clips, device, batches, num_workers, config.flips)
    for posterior, batch in encoded if mine else ():
        copies = 2 if config.flips else 1
        numbers = batch["index"] % len(clips.files)
        fields = {
            "mean": posterior.mean.unflatten(0, (copies, -1)).transpose(0, 1),
            "logvar": posterior.logvar.unflatten(0, (copies, -1)).transpose(0, 1),
            "video": numbers[:, None].expand(-1, copies),
            "start": batch["start"][:, None].expand(-1, copies),
            "mirrored": torch.arange(copies).bool().expand(len(numbers), -1),
        }
        for name, values in fields.items():
            rows.setdefault(name, []).append(values[batch["own"]].flatten(0, 1))
        skipped += batch["skipped"]
        fallbacks += batch["fallbacks"]
        if batch["index"][-1] == ranges[shard][-1]:
            tensors = {name: torch.cat(values).contiguous() for name, values in rows.items()}
            said = {
                "source": source,
                "sums": stream_sums(tensors["mean"], vae),
                "clips": len(tensors["mean"]),
                "skipped": list(dict.fromkeys(skipped)),
            }
            with atomic_write(shard_path(folder, shard, len(ranges))) as path:
                save_file(tensors, path, {"vidgen": json.dumps(said)})
            rows, skipped, shard = {}, [], next(todo, None)
    return fallbacks


def read_shard(path: Path) -> dict[str, Any]:
    """What a shard says of itself: its `source`, `sums`, number of `clips`, and the videos `skipped`."""
    with safe_open(path, "pt") as file:
        return json.loads((file.metadata() or {})["vidgen"])


def write_index(
    folder: Path,
    clips: ClipDataset,
    source: Source,
    vae: AutoencoderKLVidTwin,
    config: EncodingConfig,
    mixed_precision: str,
) -> None:
    """Write `bad_videos.jsonl`, and the index that makes the shards count."""
    root = config.data.root
    shards = math.ceil(len(clips) / config.latents.shard_size)
    paths = [shard_path(folder, shard, shards) for shard in range(shards)]
    said = [read_shard(path) for path in paths]
    if not sum(entry["clips"] for entry in said):
        raise UserError(f"No clip of {root} could be read, so there are no latents to train on.")
    mean, std = statistics_of([entry["sums"] for entry in said])
    bad_videos = BadVideos(folder / BAD_VIDEOS)
    bad_videos.add((path, reason) for entry in said for path, reason in entry["skipped"])
    index = {
        "source": source,
        "made": {"root": str(Path(root).resolve()), "mixed_precision": mixed_precision},
        "structure_shape": list(vae.structure_shape),
        "dynamics_shape": list(vae.dynamics_shape),
        "mean": mean,
        "std": std,
        "classes": list(clips.classes),
        "shards": [
            {"file": path.name, "clips": entry["clips"], "bytes": path.stat().st_size}
            for path, entry in zip(paths, said, strict=True)
        ],
        "videos": [[relative_path(file.path, root), file.label] for file in clips.files],
    }
    with atomic_write(folder / INDEX) as path:
        path.write_text(json.dumps(index))


# --- statistics -----------------------------------------------------------------------------------------------------


def stream_sums(means: torch.Tensor, vae: AutoencoderKLVidTwin) -> list[list[float]]:
    """Count, sum and sum of squares, in float64, of packed latents (N, L), of [structure, dynamics]."""
    latents = vae.unpack(means)
    streams = [latents.structure.double(), latents.dynamics.double()]
    return [[x.numel(), x.sum().item(), x.square().sum().item()] for x in streams]


def statistics_of(sums: Sequence[list[list[float]]]) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of [structure, dynamics] from the sums of parts; 0 and 1 for an empty stream."""
    mean, std = [], []
    for parts in zip(*sums, strict=True):
        count, total, squares = (math.fsum(column) for column in zip(*parts, strict=True))
        mean.append(total / count if count else 0.0)
        std.append(math.sqrt(max(squares / count - mean[-1] ** 2, 0.0)) if count else 1.0)
    return mean, std


# --- reading --------------------------------------------------------------------------------------------------------


class LatentCache(Dataset):
    """The latents of a data set under one VAE, read from disk as they are asked for.

    Asked for by index, or by (epoch, index): the latents are the same in every epoch. An item is a dict: `mean` (L,),
    float32, as encoded (not normalized); with `with_logvar` also `logvar` (L,); `label`, -1 where there is none;
    `index`, its number, for `describe`. Shards are mapped into memory, so a cache larger than the memory can be read,
    and the workers of a loader share what has been read.

    Attributes:
        classes: class names by id.
        mean, std: of all means, of [structure, dynamics].
        source: what the latents were made from.
        bad_videos: (path, reason) of the videos that could not be read.
    """

    def __init__(self, folder: str | Path, index: dict[str, Any], with_logvar: bool = False) -> None:
        self.folder = Path(folder)
        self.with_logvar = with_logvar
        self.classes: list[str] = index["classes"]
        self.mean: list[float] = index["mean"]
        self.std: list[float] = index["std"]
        self.source: Source = index["source"]
        self.bad_videos = list(BadVideos(self.folder / BAD_VIDEOS).reasons.items())
        self._videos = index["videos"]
        self._files = [shard["file"] for shard in index["shards"]]
        self._starts = [0, *accumulate(shard["clips"] for shard in index["shards"])]
        self._open: dict[int, dict[str, torch.Tensor]] = {}

    @classmethod
    def load(cls, folder: str | Path, source: Source, with_logvar: bool = False) -> LatentCache | None:
        """The cache in a folder, or None if there is no complete one.

        Raises:
            UserError: if it was made from something else than `source`, or cannot be read.
        """
        folder = Path(folder)
        if not (folder / INDEX).exists():
            return None
        try:
            index = json.loads((folder / INDEX).read_text())
            made_from = dict(index["source"])
            for shard in index["shards"]:
                if (folder / shard["file"]).stat().st_size != shard["bytes"]:
                    raise ValueError(f"{shard['file']} is cut off")
            cache = cls(folder, index, with_logvar)
        except Exception as error:
            raise UserError(f"The latent cache in {folder} cannot be read ({error}); delete the folder.") from error
        refuse_another(folder, made_from, source)
        return cache

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int | tuple[int, int]) -> dict[str, Any]:
        index = index[1] if isinstance(index, tuple) else index
        tensors, row = self._row(index)
        label = self._videos[tensors["video"][row]][1]
        item = {"mean": tensors["mean"][row], "label": -1 if label is None else label, "index": index}
        return {**item, "logvar": tensors["logvar"][row]} if self.with_logvar else item

    def describe(self, index: int) -> str:
        """Which clip an item is: the video's path within the data set, the second it starts at, and if mirrored."""
        tensors, row = self._row(index)
        path = self._videos[tensors["video"][row]][0]
        return f"{path} from {tensors['start'][row]:.2f} s{', mirrored' if tensors['mirrored'][row] else ''}"

    def _row(self, index: int) -> tuple[dict[str, torch.Tensor], int]:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is out of range for {len(self)} clips")
        shard = bisect_right(self._starts, index) - 1
        if shard not in self._open:
            with safe_open(self.folder / self._files[shard], "pt") as file:  # tensors stay on disk until read
                self._open[shard] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return self._open[shard], index - self._starts[shard]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}  # every process maps the files itself
