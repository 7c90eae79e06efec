"""Read videos from NumPy files: uint8 arrays of many videos (N, T, H, W, 3), or of one (T, H, W, 3).

The axis of the three colors may also be the second (N, 3, T, H, W) or the third (N, T, 3, H, W); it is recognized by
its length. Videos are read one at a time from memory-mapped files; only a compressed .npz is read as a whole. Arrays
of Python objects are refused.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from ..common.errors import UserError
from ..common.options import expand_home
from .file_types import is_hidden
from .summary import format_note, list_names
from .types import ArrayVideo, VideoFile
from .video_file import TIME_TOLERANCE, VideoError, VideoInfo

ARRAY_SUFFIXES = (".npy", ".npz")
LAYOUTS = ("THWC", "CTHW", "TCHW")  # of one video
LOCAL_HEADER_BYTES = 30  # of a member of a zip file, before its name


def find_arrays(root: str | os.PathLike) -> list[Path] | None:
    """The .npy or .npz file that `root` names, or those in this folder, sorted; None if it names none."""
    path = Path(expand_home(root))
    if path.is_file():
        return [path] if path.suffix.lower() in ARRAY_SUFFIXES else None
    if not path.is_dir():
        return None
    arrays = [file for file in path.iterdir() if file.suffix.lower() in ARRAY_SUFFIXES and not is_hidden(file.name)]
    return sorted(arrays) or None


def list_array_videos(
    files: list[Path], fps: float = 1.0, report: Callable[[str], object] | None = None
) -> list[VideoFile]:
    """List the videos in .npy and .npz files, in order, without classes. A .npz may hold several arrays of videos.

    Args:
        fps: frames per second that the videos are taken to have.
        report: called with a line for each array: its shape, and which axis is which.

    Raises:
        UserError: if a file holds no uint8 videos or its axes are ambiguous, or the only file cannot be read. One of
            several files that cannot be read is listed as a video, so that it is reported when it is read.
    """
    videos = []
    for file in files:
        try:
            shapes = _list_videos_in(file, report)
        except VideoError:
            if len(files) == 1:
                raise
            videos.append(VideoFile(ArrayVideo(file, None, None, LAYOUTS[0], fps), None))  # reported when it is read
            continue
        for member, shape in shapes.items():
            place = str(file) if member is None else f"{file}/{member}"
            layout = recognize_layout(shape, place)
            is_batch = len(shape) == 5
            if report is not None:
                axes = " x ".join([*(["N"] if is_batch else []), *layout])
                count = shape[0] if is_batch else 1
                report(f"{place}: {count} videos of shape {' x '.join(map(str, shape))}, read as {axes}")
            indices = range(shape[0]) if is_batch else [None]
            videos += [VideoFile(ArrayVideo(file, member, index, layout, fps), None) for index in indices]
    return videos


def recognize_layout(shape: tuple[int, ...], place: str) -> str:
    """Return which of `LAYOUTS` an array of 4 axes (a video) or 5 (videos) has: its color axis is the one of length 3.

    Raises `UserError`, naming `place`, if there is no such axis, or several.
    """
    possible = [layout for layout in LAYOUTS if shape[len(shape) - 4 + layout.index("C")] == 3]
    if len(possible) == 1:
        return possible[0]
    expected = "N T H W C or N C T H W" if len(shape) == 5 else "T H W C or C T H W"
    if not possible:
        raise UserError(f"{place} has shape {shape} without an axis of 3 colors: expected {expected} with C = 3.")
    raise UserError(
        f"{place} has shape {shape}, which is ambiguous: several axes could be the 3 colors ({', '.join(possible)}); "
        "write the videos with another number of frames or another size."
    )


def probe_array(video: ArrayVideo) -> VideoInfo:
    """Describe a video. Raises `VideoError` if the file cannot be read."""
    shape = dict(zip(video.layout, _open_video(video).shape, strict=True))
    return VideoInfo(video, shape["W"], shape["H"], video.fps, shape["T"], shape["T"] / video.fps, "array")


def read_array_clip(video: ArrayVideo, *, start: float, fps: float, num_frames: int) -> torch.Tensor:
    """Read frames as `vidgen.data.video.read_clip` does: uint8 (T, H, W, 3).

    Raises `VideoError` if the clip reaches past the end, or the file cannot be read.
    """
    array = _open_video(video).transpose([video.layout.index(axis) for axis in "THWC"])
    numbers = np.floor((start + np.arange(num_frames) / fps + TIME_TOLERANCE) * video.fps).astype(int)
    if start < 0 or numbers[-1] >= len(array):
        raise VideoError(f"too short: frame {numbers[-1]} of {len(array)}", video)
    return torch.from_numpy(np.ascontiguousarray(array[numbers]))


# --- files ----------------------------------------------------------------------------------------------------------


def _list_videos_in(file: Path, report: Callable[[str], object] | None) -> dict[str | None, tuple[int, ...]]:
    """The shapes of the arrays of videos in a file, by member; None is the array of a .npy file."""
    if file.suffix.lower() == ".npy":
        array = _open_array(file, None)
        if array.dtype == np.uint8 and array.ndim in (4, 5):
            return {None: array.shape}
        raise UserError(f"{file} holds {array.dtype} of shape {array.shape}: {_EXPECTED}")
    try:
        with zipfile.ZipFile(file) as archive:
            members = [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]
    except (OSError, zipfile.BadZipFile) as error:
        raise VideoError(f"it cannot be read as a .npz file ({error})", file) from error
    kinds = {member: _read_header(file, member) for member in members}
    videos = {
        name: shape for name, (shape, _, dtype, _) in kinds.items() if dtype == np.uint8 and len(shape) in (4, 5)
    }
    if not videos:
        others = [f"{name} ({dtype} of shape {shape})" for name, (shape, _, dtype, _) in kinds.items()]
        raise UserError(f"{file} holds {list_names(others) or 'no arrays'}: {_EXPECTED}")
    if report is not None:
        for note in format_note(f"ignored arrays in {file}", [name for name in members if name not in videos]):
            report(note)
    return videos


_EXPECTED = "expected videos as uint8 of 5 axes, N T H W C or N C T H W, or of 4 for one video."


def _open_video(video: ArrayVideo) -> np.ndarray:
    """Map a video's array, in the file's layout. The mapping ends with the array, so memory does not fill up."""
    array = _open_array(video.file, video.member)
    return array if video.index is None else array[video.index]


def _open_array(file: Path, member: str | None) -> np.ndarray:
    try:
        if member is None:
            array = np.load(file, mmap_mode="r", allow_pickle=False)
            if not isinstance(array, np.ndarray):
                raise ValueError("it is a .npz file")
            return array
        shape, fortran, dtype, offset = _read_header(file, member)
        if offset is None:
            return _decompress(file, member)
        return np.memmap(file, dtype, "r", offset, shape, "F" if fortran else "C")
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        if isinstance(error, UserError):
            raise
        raise VideoError(f"it cannot be read as an array ({error})", file) from error


@lru_cache(maxsize=64)
def _read_header(file: Path, member: str) -> tuple[tuple[int, ...], bool, np.dtype, int | None]:
    """Shape, order and type of an array in a .npz file, and the offset of its values; None if it is compressed."""
    try:
        with zipfile.ZipFile(file) as archive, archive.open(f"{member}.npy") as content:
            version = np.lib.format.read_magic(content)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, fortran, dtype = read(content)
            entry, header_size = archive.getinfo(f"{member}.npy"), content.tell()
        if entry.compress_type != zipfile.ZIP_STORED:
            return shape, fortran, dtype, None
        with open(file, "rb") as raw:
            raw.seek(entry.header_offset)
            local = raw.read(LOCAL_HEADER_BYTES)
        lengths = int.from_bytes(local[26:28], "little") + int.from_bytes(local[28:30], "little")  # name and extra
        return shape, fortran, dtype, entry.header_offset + LOCAL_HEADER_BYTES + lengths + header_size
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise VideoError(f"its array {member} cannot be read ({error})", file) from error


@lru_cache(maxsize=1)
def _decompress(file: Path, member: str) -> np.ndarray:
    with np.load(file, allow_pickle=False) as arrays:
        return arrays[member]
