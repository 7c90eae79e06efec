"""Damaged files among good ones: every good clip is read, every bad file is listed, and nothing crashes or hangs.

The full count, 200 bad among 50 good, is marked slow: `pytest -m slow tests/vidgen/data/test_damaged_videos.py`.
"""

from __future__ import annotations

import faulthandler
import os
from pathlib import Path

import av
import numpy as np
import psutil
import pytest
import torch
from torch.utils.data import DataLoader
from video_makers import MUTATIONS, encode, mutate

from vidgen.data.dataset import ClipDataset, collate_clips
from vidgen.data.video import VideoError, read_clip

SHAPE = dict(num_frames=8, fps=8, resolution=32)
LONGEST_HANG = 60  # seconds


@pytest.fixture(scope="module")
def sources(sprites, frames, tmp_path_factory, request) -> list[Path]:
    """Good videos of many kinds: sprites, other codecs and containers, and real clips where there are any.

    Not HEVC and VP9, to whose decoders any bits are a picture, nor MPEG-TS, which may end anywhere: there nobody can
    tell that some bits were flipped, or the end cut off.
    """
    folder = tmp_path_factory.mktemp("sources")
    made = [
        encode(folder / "b_frames.mkv", frames, options={"g": "12", "bf": "3"}),
        encode(folder / "a.avi", frames, "mpeg4", options={"g": "12"}),
        encode(folder / "sound.mp4", frames, audio=True),
        encode(folder / "a.mov", frames, "mpeg4", options={"g": "12"}),
    ]
    real = Path(__file__).parents[4] / "shared" / "data" / "clips"  # not the fixture: it would skip without them
    return [*sorted(sprites.rglob("*.mp4"))[::2], *made, *sorted(real.rglob("v_*.avi")), *real.rglob("realshort.mp4")]


def write_mixture(folder: Path, sources: list[Path], good: int, bad: int) -> dict[Path, Path]:
    """Write good and damaged files in random order; returns the source of each."""
    rng = np.random.default_rng(good)
    kinds = rng.permutation(["good"] * good + [MUTATIONS[i % len(MUTATIONS)] for i in range(bad)]).tolist()
    origin = {}
    for number, kind in enumerate(kinds):
        source = sources[number % len(sources)]
        other = next(path for path in sources if path.suffix != source.suffix)
        content = source.read_bytes()
        if kind != "good":
            content = mutate(content, kind, other.read_bytes(), rng)
        path = folder / f"{number:03} {kind}{source.suffix}"
        path.write_bytes(content)
        origin[path] = source
    return origin


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("good", "bad"), [(10, 40), pytest.param(50, 200, marks=pytest.mark.slow)])
def test_an_epoch_over_damaged_files(tmp_path, sources, good, bad, workers):
    origin = write_mixture(tmp_path, sources, good, bad)
    data = ClipDataset(tmp_path, **SHAPE, train=False)
    intact = ClipDataset(tmp_path, **SHAPE, train=False)  # the clip of each file without damage
    intact.files = [file._replace(path=origin[file.path]) for file in data.files]
    loader = DataLoader(
        data,
        batch_size=5,
        num_workers=workers,
        persistent_workers=workers > 0,
        timeout=LONGEST_HANG if workers else 0,
        collate_fn=collate_clips,
    )
    faulthandler.dump_traceback_later(LONGEST_HANG * 5, exit=True)
    memory = []
    try:
        for _ in range(4):
            batches = list(loader)
            memory.append(memory_of_all(workers))
    finally:
        faulthandler.cancel_dump_traceback_later()

    listed = {Path(path): reason for batch in batches for path, reason in batch["skipped"]}
    assert all(listed.values()) and not any("good" in path.name for path in listed)
    assert torch.cat([batch["index"] for batch in batches]).tolist() == list(range(good + bad))
    videos = torch.cat([batch["video"] for batch in batches])
    harmless = 0
    for index, path in enumerate(path for batch in batches for path in batch["path"]):
        file = data.files[index].path
        if file in listed:
            assert Path(path) != file and data.files[index].path.name != Path(path).name
        else:  # its clip equals that of the undamaged file
            assert path == str(file)
            assert torch.equal(videos[index], intact[index]["video"]), file.name
            harmless += "good" not in file.name
    assert harmless <= bad / 6  # damage outside the requested clip
    assert memory[-1] - memory[0] < 50e6, memory


def memory_of_all(workers: int) -> int:
    """The memory in bytes of this process, or of its children."""
    me = psutil.Process(os.getpid())
    return sum(p.memory_info().rss for p in me.children()) if workers else me.memory_info().rss


def test_damage_before_a_clip_is_reported_if_the_clip_depends_on_it(tmp_path, frames):
    path = encode(tmp_path / "a.mp4", frames, options={"g": "24", "bf": "0"})
    right = read_clip(path, start=26 / 25, fps=25, num_frames=4)
    with av.open(str(path)) as container:
        places = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    content = bytearray(path.read_bytes())
    position, size = places[4]
    content[position + size // 2 : position + size] = bytes(size - size // 2)
    path.write_bytes(content)
    with pytest.raises(VideoError, match=r"decoded|damaged"):
        read_clip(path, start=10 / 25, fps=25, num_frames=4)  # frames 10 to 13 depend on frame 4
    assert torch.equal(read_clip(path, start=26 / 25, fps=25, num_frames=4), right)  # these do not
    assert torch.equal(read_clip(path, start=0, fps=25, num_frames=4), read_clip(path, fps=25, num_frames=4))
