"""Which files are videos: by their endings, and by their first bytes where other kinds of files share an ending."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import BinaryIO

from .video import VIDEO_EXTENSIONS

HEAD = 4096  # bytes that tell most kinds of files
SHOWN = 3  # names or endings in a note
COMMON_EXTENSIONS = (".avi", ".mkv", ".mov", ".mp4", ".webm")  # named in messages, in the place of all of them
OGG_VIDEO = (b"\x80theora", b"BBCD\0", b"OVP80", b"\1video")  # first bytes of the headers of video codecs
SYSTEM_FOLDERS = {"__MACOSX", "@eaDir"}  # macOS archives and Synology disks: metadata under the videos' names


def has_video_ending(name: str) -> bool:
    """Whether a file's name ends as those of videos do."""
    return PurePosixPath(name).suffix.lower() in VIDEO_EXTENSIONS


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name, without its parents, is hidden or an operating system's metadata."""
    return name.startswith(".") or name in SYSTEM_FOLDERS


def is_other_content(name: str, file: BinaryIO) -> bool:
    """Whether a file with the ending of a video is recognized as text, a still image or sound alone.

    Only endings that other files share are looked into: .ts and .mts (TypeScript), .asf (motion capture), .gif,
    .webp, .avif and .apng (still images), .ogg (sound). What is not recognized counts as a video, so that a damaged
    one is reported rather than left out.
    """
    recognize = _OTHERS.get(PurePosixPath(name).suffix.lower())
    return recognize is not None and recognize(file)


def _is_text(file: BinaryIO) -> bool:
    head = file.read(HEAD)
    return bool(head) and min(head) >= 9  # below the tab there are control bytes, which every video has


def _is_still_gif(file: BinaryIO) -> bool:
    from PIL import Image

    try:
        with Image.open(file, formats=["GIF"]) as image:
            return not image.is_animated
    except Exception:  # not a GIF, or damaged: reported when it is read
        return False


def _is_still_webp(file: BinaryIO) -> bool:
    head = file.read(21)
    animated = head[12:16] == b"VP8X" and bool(head[20:21]) and bool(head[20] & 2)
    return head[:4] == b"RIFF" and head[8:12] == b"WEBP" and not animated


def _is_still_avif(file: BinaryIO) -> bool:
    return file.read(12)[4:] in (b"ftypavif", b"ftypmif1", b"ftypheic")


def _is_still_png(file: BinaryIO) -> bool:
    head = file.read(HEAD)
    return head.startswith(b"\x89PNG") and b"acTL" not in head


def _is_ogg_sound(file: BinaryIO) -> bool:
    head = file.read(HEAD)
    return head.startswith(b"OggS") and not any(codec in head for codec in OGG_VIDEO)


_OTHERS: dict[str, Callable[[BinaryIO], bool]] = {
    ".ts": _is_text,
    ".mts": _is_text,
    ".asf": _is_text,
    ".gif": _is_still_gif,
    ".webp": _is_still_webp,
    ".avif": _is_still_avif,
    ".apng": _is_still_png,
    ".ogg": _is_ogg_sound,
}


@dataclass
class LeftOut:
    """The files of a data set that are not taken for videos, for its summary."""

    endings: Counter[str] = field(default_factory=Counter)
    contents: list[str] = field(default_factory=list)  # names of those that end as videos do
    links: list[str] = field(default_factory=list)  # names of links in archives

    def admit(self, name: str, open_file: Callable[[], BinaryIO]) -> bool:
        """Whether a file is a video; remembers it if not. `open_file` is called where its name cannot tell."""
        suffix = PurePosixPath(name).suffix.lower()
        if suffix not in VIDEO_EXTENSIONS:
            self.endings[suffix or "no ending"] += 1
            return False
        if suffix in _OTHERS:
            try:
                with open_file() as file:
                    if is_other_content(name, file):
                        self.contents.append(name)
                        return False
            except OSError:  # reported when it is read
                pass
        return True

    def describe(self) -> list[str]:
        """One clause for each kind of files that were left out."""
        notes = []
        if self.endings:
            ordered = [ending for ending, _ in sorted(self.endings.items(), key=lambda item: (-item[1], item[0]))]
            notes.append(
                f"{count(sum(self.endings.values()), 'file')} of other endings {are(sum(self.endings.values()))} left "
                f"out ({some(ordered, 2 * SHOWN)})"
            )
        if self.contents:
            notes.append(
                f"{count(len(self.contents), 'file')} {are(len(self.contents))} left out because of "
                f"{'their' if len(self.contents) > 1 else 'its'} content, which is text, a still image or only sound "
                f"({some(self.contents)})"
            )
        if self.links:
            notes.append(
                f"{count(len(self.links), 'link')} in shards {are(len(self.links))} left out ({some(self.links)})"
            )
        return notes


def count(number: int, noun: str, plural: str | None = None) -> str:
    """A number with its noun: 1 video, 1,000 videos."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def are(number: int) -> str:
    return "is" if number == 1 else "are"


def some(names: Collection[object], shown: int = SHOWN) -> str:
    """The first names, with an ellipsis where there are more."""
    return ", ".join([*map(str, list(names)[:shown]), *(["..."] if len(names) > shown else [])])
