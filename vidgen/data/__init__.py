"""Video data: files in and out as clips or frame by frame, listing datasets, cutting clips, and sprites."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .dataset import (
        BadVideos,
        ClipDataset,
        clip_to_frames,
        collate_clips,
        frames_to_clip,
    )
    from .listing import VideoFile, list_train_and_validation, list_videos, split_validation
    from .shards import write_shards
    from .sprites import MOTIONS, render_sprite, sample_factors, write_sprites
    from .streams import FrameReader, VideoWriter, open_writer
    from .ucf101 import ucf101_split
    from .video import VIDEO_EXTENSIONS, ShardMember, VideoError, VideoInfo, probe, read_clip, write_video

_HOMES = {
    "BadVideos": "dataset",
    "ClipDataset": "dataset",
    "FrameReader": "streams",
    "MOTIONS": "sprites",
    "ShardMember": "video",
    "VIDEO_EXTENSIONS": "video",
    "VideoError": "video",
    "VideoFile": "listing",
    "VideoInfo": "video",
    "VideoWriter": "streams",
    "clip_to_frames": "dataset",
    "collate_clips": "dataset",
    "frames_to_clip": "dataset",
    "list_train_and_validation": "listing",
    "list_videos": "listing",
    "open_writer": "streams",
    "probe": "video",
    "read_clip": "video",
    "render_sprite": "sprites",
    "sample_factors": "sprites",
    "split_validation": "listing",
    "ucf101_split": "ucf101",
    "write_shards": "shards",
    "write_sprites": "sprites",
    "write_video": "video",
}

__all__ = [
    "MOTIONS",
    "VIDEO_EXTENSIONS",
    "BadVideos",
    "ClipDataset",
    "FrameReader",
    "ShardMember",
    "VideoError",
    "VideoFile",
    "VideoInfo",
    "VideoWriter",
    "clip_to_frames",
    "collate_clips",
    "frames_to_clip",
    "list_train_and_validation",
    "list_videos",
    "open_writer",
    "probe",
    "read_clip",
    "render_sprite",
    "sample_factors",
    "split_validation",
    "ucf101_split",
    "write_shards",
    "write_sprites",
    "write_video",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *_HOMES]
