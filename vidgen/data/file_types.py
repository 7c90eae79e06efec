"""Recognize video files by their extension, and by their first bytes where other file types share the extension."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import BinaryIO

from .summary import format_note

# Extensions of the video files that FFmpeg reads. Left out are playlists, audio, still images, raw pixels, and
# extensions that mostly mean something else (.dat, .mod, .drc, .swf).
_EXTENSIONS = """
    mp4 m4v mp4v mov qt 3gp 3g2 3gpp 3gpp2 3gp2 f4v ismv mj2 avif
    avi divx xvid amv asf wmv wm wtv dvr-ms flv mkv mk3d webm ogv ogm ogx ogg nut rm rmvb rv
    mpg mpeg mpe mpv m1v m2v m2p mp2v vob vro evo ts mts m2ts m2t tp trp tod mxf gxf dv dif imx
    gif apng webp flc fli mjpeg mjpg y4m ivf obu vc1 h261 h263 h264 264 avc h265 265 hevc h266 266 vvc
    nsv nuv roq bik smk viv movie dav pva
"""
VIDEO_EXTENSIONS = frozenset(f".{extension}" for extension in _EXTENSIONS.split())
# Extensions that other types share: TypeScript, motion capture (.asf), still images, audio.
SHARED_EXTENSIONS = frozenset({".ts", ".mts", ".asf", ".gif", ".webp", ".avif", ".apng", ".ogg"})
HEAD_BYTES = 4096  # enough to recognize most file types
OGG_VIDEO = (b"\x80theora", b"BBCD\0", b"OVP80", b"\1video")  # first bytes of the headers of video codecs
SYSTEM_FOLDERS = {"__MACOSX", "@eaDir"}  # macOS archives and Synology disks: metadata under the videos' names


def has_video_extension(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in VIDEO_EXTENSIONS


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name, without its parents, is hidden or an operating system's metadata."""
    return name.startswith(".") or name in SYSTEM_FOLDERS


def is_other_type(name: str, open_file: Callable[[], BinaryIO]) -> bool:
    """Whether a file with a video extension is recognized as text, a still image or audio.

    Opens only files with `SHARED_EXTENSIONS`. Unrecognized content counts as video, so that damaged videos are
    reported rather than ignored.
    """
    extension = PurePosixPath(name).suffix.lower()
    if extension not in SHARED_EXTENSIONS:
        return False
    try:
        with open_file() as file:
            return _has_other_content(extension, file)
    except OSError:  # reported when it is read
        return False


def _has_other_content(extension: str, file: BinaryIO) -> bool:
    if extension == ".gif":
        return _is_still_gif(file)
    head = file.read(HEAD_BYTES)
    if extension == ".webp":
        is_animated = head[12:16] == b"VP8X" and len(head) > 20 and bool(head[20] & 2)
        return head[:4] == b"RIFF" and head[8:12] == b"WEBP" and not is_animated
    if extension == ".avif":
        return head[4:12] in (b"ftypavif", b"ftypmif1", b"ftypheic")
    if extension == ".apng":
        return head.startswith(b"\x89PNG") and b"acTL" not in head
    if extension == ".ogg":
        return head.startswith(b"OggS") and not any(codec in head for codec in OGG_VIDEO)
    return bool(head) and min(head) >= 9  # text: every video has control bytes below the tab


def _is_still_gif(file: BinaryIO) -> bool:
    from PIL import Image

    try:
        with Image.open(file, formats=["GIF"]) as image:
            return not image.is_animated
    except Exception:  # not a GIF, or damaged: reported when it is read
        return False


@dataclass
class IgnoredFiles:
    """The files of a data set that are not videos, for its summary."""

    extensions: Counter[str] = field(default_factory=Counter)
    contents: list[str] = field(default_factory=list)  # names with a video extension, but other content
    links: list[str] = field(default_factory=list)  # names of links in archives

    def accept(self, name: str, open_file: Callable[[], BinaryIO]) -> bool:
        """Whether a file is a video; remembers it if not. `open_file` is called where its name is ambiguous."""
        if not has_video_extension(name):
            self.extensions[PurePosixPath(name).suffix.lower() or "no extension"] += 1
            return False
        if is_other_type(name, open_file):
            self.contents.append(name)
            return False
        return True

    def describe(self) -> list[str]:
        """One note for each kind of ignored files."""
        extensions = sorted(self.extensions, key=lambda extension: (-self.extensions[extension], extension))
        count = self.extensions.total()
        return [
            *format_note("ignored files with other extensions", extensions, count=count, shown=6),
            *format_note("ignored files that hold text, a still image or only audio", self.contents),
            *format_note("ignored links in shards", self.links),
        ]
