"""Datasets: listing, validation splits, samples, and unusable videos."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from vidgen.common.errors import UserError
from vidgen.data import dataset as module
from vidgen.data.dataset import BadVideos, ClipDataset, collate_clips
from vidgen.data.listing import list_videos
from vidgen.data.splits import split_validation
from vidgen.data.sprites import MOTIONS
from vidgen.data.transforms import clip_to_frames, frames_to_clip, swap_background
from vidgen.data.types import VideoFile
from vidgen.data.video import VideoError, read_clip, write_video

SHAPE = {"num_frames": 8, "fps": 8, "resolution": 32}


@pytest.fixture
def broken(sprites, tmp_path) -> Path:
    """Plain folder: five good videos among a text, an empty, a cut-off, a damaged and a too short one."""
    good = sorted(sprites.rglob("*.mp4"))
    for name, path in zip(["b", "d", "f", "h", "j"], good[::3], strict=False):
        shutil.copy(path, tmp_path / f"{name}.mp4")
    content = max((path.read_bytes() for path in good), key=len)
    (tmp_path / "a.mp4").write_bytes(b"not a video\n" * 100)
    (tmp_path / "c.mp4").write_bytes(b"")
    (tmp_path / "e.mp4").write_bytes(content[: len(content) * 6 // 10])
    (tmp_path / "g.mp4").write_bytes(content[: len(content) * 2 // 3] + bytes(len(content) - len(content) * 2 // 3))
    write_video(tmp_path / "i.mp4", np.zeros((4, 64, 64, 3), np.uint8), 8)
    return tmp_path


def touch(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def same(a: dict, b: dict) -> bool:
    return (
        a.keys() == b.keys() and torch.equal(a["video"], b["video"]) and all(a[k] == b[k] for k in a if k != "video")
    )


# --- listing ---------------------------------------------------------------------------------------------------------


def test_real_clips_are_labeled_by_the_folder_that_holds_them(clips):
    files, classes = list_videos(clips / "ucf101")
    assert classes == ["ApplyEyeMakeup", "BaseballPitch"]
    assert [(file.path.parent.name, file.label) for file in files] == [("ApplyEyeMakeup", 0), ("BaseballPitch", 1)]
    files, classes = list_videos(clips)
    assert classes == ["ApplyEyeMakeup", "BaseballPitch", "varied"]
    assert Counter(file.label for file in files) == {0: 1, 1: 1, 2: 11}
    files, classes = list_videos(clips / "varied")
    assert classes == [] and len(files) == 11 and {file.label for file in files} == {None}


def test_folders_are_classes(tmp_path):
    root = touch(
        tmp_path, "train/b/1.mp4", "train/a/2.AVI", "test/b/3.webm", "a/.hidden.mp4", ".git/x.mp4", "a/notes.txt"
    )
    files, classes = list_videos(str(root))
    assert classes == ["a", "b"]
    assert [(str(f.path.relative_to(root)), f.label) for f in files] == [
        ("test/b/3.webm", 1), ("train/a/2.AVI", 0), ("train/b/1.mp4", 1)]  # fmt: skip
    touch(root, "0.mkv")  # a video in the root has no class; the others keep their classes
    files, classes = list_videos(root)
    assert classes == ["a", "b"] and [f.label for f in files] == [None, 1, 0, 1]


def test_links_are_followed_but_not_in_circles(tmp_path):
    elsewhere = touch(tmp_path / "elsewhere", "1.mp4")
    root = touch(tmp_path / "root", "b/2.mp4")
    (root / "a").symlink_to(elsewhere, target_is_directory=True)
    (root / "b" / "up").symlink_to(root, target_is_directory=True)
    files, classes = list_videos(root)
    assert classes == ["a", "b"] and len(files) == 2


def test_csv_lists_paths_and_classes(tmp_path, sprites):
    table = tmp_path / "lists" / "train.csv"
    touch(tmp_path, "lists/x")
    absolute = next(sprites.rglob("*.mp4"))
    table.write_text(f"\ufeffpath,label\n../videos/b.mp4,run\n{absolute}, jump\n\nc.mp4,\n", encoding="utf-8")
    files, classes = list_videos(table)
    assert classes == ["jump", "run"]
    assert files == [(table.parent / "../videos/b.mp4", 1), (absolute, 0), (table.parent / "c.mp4", None)]
    table.write_text("path,label\n" + "".join(f"{n}.mp4,{n}\n" for n in (10, 2, 1)))
    assert list_videos(table)[1] == ["1", "2", "10"]
    table.write_text("path\na.mp4\n")
    assert list_videos(table) == ([(tmp_path / "lists" / "a.mp4", None)], [])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda root: root / "missing", "no dataset at .*missing: expected a folder of videos, shards, or a CSV file"),
        (lambda root: root, "no video in .*: expected files ending in .avi, "),
        (lambda root: touch(root, "a.txt") / "a.txt", "a.txt is not a dataset"),
        (lambda root: touch(root, "a.csv") / "a.csv", "no video in .*a.csv"),
        (lambda root: _write(root / "b.csv", b"file,label\na.mp4,x\n"), "b.csv has no column 'path': its first line"),
        (lambda root: _write(root / "c.csv", b"\xff\xfe\x00path"), "c.csv is not a CSV file"),
    ],
)
def test_invalid_dataset_raises_one_sentence(tmp_path, make, message):
    with pytest.raises(ValueError, match=message) as caught:
        ClipDataset(make(tmp_path), **SHAPE)
    assert "\n" not in str(caught.value)


def _write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


# --- splits ----------------------------------------------------------------------------------------------------------


@given(
    labels=st.lists(st.one_of(st.none(), st.integers(0, 4)), min_size=2, max_size=30),
    share=st.floats(0, 0.999),
    seed=st.integers(0, 99),
)
@settings(max_examples=80, deadline=None)
def test_split_keeps_every_file_once_and_every_class_if_possible(labels, share, seed):
    files = [VideoFile(Path(f"{number}.mp4"), label) for number, label in enumerate(labels)]
    num_validation = int(share * len(files))
    train, validation = split_validation(files, num_validation, seed)
    assert len(validation) == num_validation
    assert sorted(train + validation, key=files.index) == files
    assert (train, validation) == split_validation(files, num_validation, seed)
    assert train == sorted(train, key=files.index) and validation == sorted(validation, key=files.index)
    sizes, held = Counter(labels), Counter(file.label for file in validation)
    splittable = [label for label in sizes if sizes[label] > 1]
    if num_validation >= len(splittable):
        assert all(held[label] for label in splittable)
    if num_validation <= len(files) - len(sizes):
        assert all(sizes[label] > held[label] for label in sizes)


def test_split_shares_no_file_and_leaves_some_for_training():
    files = [VideoFile(Path(f"{n % 5}.mp4"), None) for n in range(10)]  # each listed twice
    train, validation = split_validation(files, 2, seed=0)
    assert len(train) == 6 and len(validation) == 4
    assert not {f.path for f in train} & {f.path for f in validation}
    assert any(split_validation(files, 2, seed)[1] != validation for seed in range(1, 5))
    with pytest.raises(ValueError, match="cannot hold out 5 of 5 videos: choose from 0 to 4"):
        split_validation(files, 5, seed=0)


# --- samples ---------------------------------------------------------------------------------------------------------


def test_sample_fields(sprites):
    clips = ClipDataset(sprites, **SHAPE)
    assert len(clips) == 16 and clips.classes == sorted(MOTIONS)
    assert clips.id2label == dict(enumerate(sorted(MOTIONS)))
    sample = clips[5]
    assert sample["video"].shape == (3, 8, 32, 32) and sample["video"].dtype == torch.float32
    assert sample["video"].min() >= -1 and sample["video"].max() <= 1
    assert sample["label"] == clips.classes.index(Path(sample["path"]).parent.name)
    assert sample["index"] == 5 and sample["skipped"] == [] and 0 <= sample["start"] <= 1.125
    for index in (-1, 16):
        with pytest.raises(IndexError):
            clips[index]


def test_clip_of_full_size_equals_the_file(sprites):
    sample = ClipDataset(sprites, 16, 8, 64, train=False)[3]
    assert torch.equal(clip_to_frames(sample["video"]), read_clip(sample["path"], fps=8, num_frames=16))


@pytest.mark.parametrize("resolution", [48, (32, 64), (64, 32)])
def test_real_clips_of_all_sizes_are_batched(clips, resolution):
    data = ClipDataset(clips, 4, 6, resolution, train=False)
    batch = collate_clips([data[i] for i in range(0, len(data), 3)])
    height, width = (resolution, resolution) if isinstance(resolution, int) else resolution
    assert batch["video"].shape[1:] == (3, 4, height, width) and not batch["skipped"]
    assert (batch["video"].flatten(1).std(1) > 0.02).all()


def test_resizing_keeps_proportions_and_crops_the_center(tmp_path):
    frames = np.zeros((8, 64, 128, 3), np.uint8)
    frames[:, :, 32:96] = 255  # the middle square
    write_video(tmp_path / "wide.mp4", frames, 8)
    assert ClipDataset(tmp_path, **SHAPE, train=False)[0]["video"].min() > 0.5  # its edges include a little black
    both = ClipDataset(tmp_path, 8, 8, (32, 64), train=False)[0]["video"]
    assert both[..., :14].max() < -0.9 < 0.9 < both[..., 18:46].min()


def test_resizing_is_antialiased(tmp_path):
    checks = np.indices((96, 96)).sum(0) % 2 * 255
    write_video(tmp_path / "a.mp4", np.repeat(checks[None, ..., None], 8, 0).repeat(3, -1).astype(np.uint8), 8)
    video = ClipDataset(tmp_path, 8, 8, 32, train=False)[0]["video"]
    assert video[..., 1:-1, 1:-1].abs().max() < 0.3  # gray: neither black nor white


def test_training_clips_depend_on_seed_epoch_and_index_only(clips):
    def videos(seed=0, epoch=0, order=(0, 1), **how) -> list[dict]:
        data = ClipDataset(clips / "ucf101", **SHAPE, seed=seed, **how)
        drawn = {index: data[epoch, index] for index in order}
        return [drawn[0], drawn[1]]

    first = videos()
    assert same(first[1], ClipDataset(clips / "ucf101", **SHAPE)[1])  # epoch 0 by default
    assert all(map(same, first, videos(order=(1, 0, 1))))
    assert not any(map(same, first, videos(epoch=1)))
    assert not any(map(same, first, videos(seed=1)))
    assert all(map(same, videos(epoch=3), videos(epoch=3)))
    middle = videos(train=False)
    assert all(map(same, middle, videos(train=False, epoch=7, seed=3)))


def test_flip_applies_to_about_half_and_only_in_training(sprites):
    plain, flipped = (ClipDataset(sprites, 8, 8, 64, flip=flip) for flip in (False, True))
    mirrored = 0
    for index in range(16):
        a, b = plain[index]["video"], flipped[index]["video"]
        assert torch.equal(a, b) or torch.equal(a.flip(-1), b)
        mirrored += not torch.equal(a, b)
    assert 3 <= mirrored <= 13
    still = [ClipDataset(sprites, 8, 8, 64, train=False, flip=flip) for flip in (False, True)]
    assert all(same(still[0][index], still[1][index]) for index in range(8))


def test_zoom_shows_a_part_of_the_frame(tmp_path):
    ramp = np.broadcast_to(np.linspace(0, 255, 96).astype(np.uint8)[None, None, :, None], (8, 64, 96, 3))
    write_video(tmp_path / "a.mp4", ramp, 8)
    data = ClipDataset(tmp_path, 8, 8, (32, 48), zoom=2)
    spans = [data[epoch, 0]["video"].diff(dim=-1).mean().item() for epoch in range(12)]
    whole = ClipDataset(tmp_path, 8, 8, (32, 48), zoom=2, train=False)[0]["video"].diff(dim=-1).mean().item()
    assert all(whole / 2.1 < span < 1.05 * whole for span in spans)
    assert max(spans) - min(spans) > 0.2 * whole
    assert data[0]["video"].shape == (3, 8, 32, 48)


def test_speed_is_limited_by_short_videos(tmp_path):
    """Frames whose gray level is their time: the steps between them are the speed."""
    for name, frames in (("a", 17), ("b", 60)):
        times = np.broadcast_to((4 * np.arange(frames, dtype=np.uint8))[:, None, None, None], (frames, 64, 64, 3))
        write_video(tmp_path / f"{name}.mp4", times, 8)
    data = ClipDataset(tmp_path, 8, 8, 32, speed=3)
    steps = {index: [] for index in range(2)}
    for epoch in range(16):
        for index in range(2):
            sample = data[epoch, index]
            assert sample["skipped"] == []
            levels = sample["video"].mean(dim=(0, 2, 3)) * 127.5 / 4
            steps[index].append((levels[-1] - levels[0]).item() / 7)
    assert 0.25 < min(steps[0]) < 0.8 and 2 < max(steps[0]) < 2.4  # 17 frames at up to 16 / 7 times the speed
    assert 0.25 < min(steps[1]) < 0.8 and 2.4 < max(steps[1]) < 3.2


def test_color_changes_the_levels_of_a_whole_clip(tmp_path):
    levels = np.broadcast_to(np.linspace(40, 200, 8).astype(np.uint8)[:, None, None, None], (8, 64, 64, 3))
    write_video(tmp_path / "a.mp4", levels, 8)
    plain, changed = (ClipDataset(tmp_path, 8, 8, 32, color=color) for color in (0.0, 0.4))
    before, gains = plain[0]["video"].mean(dim=(2, 3)), []  # (3, 8)
    for epoch in range(12):
        after = changed[epoch, 0]["video"].mean(dim=(2, 3))
        inside = after.abs() < 0.99
        for x, y, use in zip(before, after, inside, strict=True):  # of each channel, one gain for all frames
            gain = (y[use][-1] - y[use][0]) / (x[use][-1] - x[use][0])
            assert torch.allclose(y[use] - y[use][0], gain * (x[use] - x[use][0]), atol=0.02)
            gains.append(gain.item())
    assert 0.6**2 < min(gains) < 0.8 and 1.25 < max(gains) < 0.6**-2
    assert same(changed[3, 0], changed[3, 0]) and not torch.equal(changed[3, 0]["video"], changed[4, 0]["video"])
    still = ClipDataset(tmp_path, 8, 8, 32, train=False, color=0.4)
    assert torch.equal(still[0]["video"], plain[0]["video"])


def moving_square(level: int, path: list[int]) -> np.ndarray:
    """A video (16, 64, 64, 3) of a gray level, in which a white square of 16 pixels moves through these columns."""
    frames = np.full((16, 64, 64, 3), level, dtype=np.uint8)
    for frame, column in zip(frames, path, strict=True):
        frame[24:40, column : column + 16] = 255
    return frames


def test_a_swapped_background_keeps_what_moves():
    walk = moving_square(40, list(range(0, 48, 3)))
    clip, other = (
        frames_to_clip(torch.from_numpy(frames)) for frames in (walk, moving_square(120, [0] * 8 + [48] * 8))
    )
    other[:, :, :8] = -1.0  # a stripe that stands still, above what moves
    swapped = swap_background(clip, other)
    assert swapped.shape == clip.shape and swapped.abs().max() <= 1
    square = clip > 0.99
    assert (swapped - clip)[square].abs().mean() < 0.02
    far = F.max_pool3d(square.float()[None], (1, 15, 15), 1, (0, 7, 7))[0] == 0
    still = torch.full((), 120 / 127.5 - 1)
    assert torch.allclose(swapped[:, :, 8:][far[:, :, 8:]], still, atol=0.01)  # without the other square
    assert (swapped[:, :, :8] < -0.99).all()
    same_clip = swap_background(clip, clip)
    assert (same_clip - clip).abs().max() < 0.11  # within the tenth of the range that counts as still


@pytest.mark.parametrize("classes", [(), ("walk",)])
def test_backgrounds_are_swapped_for_classes_of_motion(tmp_path, classes):
    for name, level in (("walk", 40), ("room", 120)):
        (tmp_path / name).mkdir()
        write_video(tmp_path / name / "a.mp4", moving_square(level, list(range(0, 48, 3))), 8)
    how = dict(num_frames=16, fps=8, resolution=64)
    data = ClipDataset(tmp_path, **how, background_swap=0.5, motion_classes=classes)
    plain = ClipDataset(tmp_path, **how)
    names = [data.classes[data[i]["label"]] for i in range(2)]
    levels = {name: 127.5 + 127.5 * plain[i]["video"][:, :, :8].mean() for i, name in enumerate(names)}
    for i, (name, other) in enumerate(zip(names, names[::-1], strict=True)):
        found = [(127.5 + 127.5 * data[epoch, i]["video"][:, :, :8].mean()) for epoch in range(16)]
        swapped = [abs(level - levels[other]) < 2 for level in found]
        assert all(
            is_swapped or abs(level - levels[name]) < 2 for is_swapped, level in zip(swapped, found, strict=True)
        )
        assert 3 <= sum(swapped) <= 13 if name == "walk" or not classes else not any(swapped)
    assert same(data[3, 0], data[3, 0])
    fixed = ClipDataset(tmp_path, **how, train=False, background_swap=1.0)
    assert all(same(fixed[i], ClipDataset(tmp_path, **how, train=False)[i]) for i in range(2))


def test_a_background_of_an_unreadable_video_is_not_taken(tmp_path):
    write_video(tmp_path / "a.mp4", moving_square(40, list(range(0, 48, 3))), 8)
    (tmp_path / "b.mp4").write_bytes(b"not a video")
    data = ClipDataset(tmp_path, 16, 8, 64, background_swap=1.0)
    assert same(data[0], ClipDataset(tmp_path, 16, 8, 64)[0])


def test_an_unknown_motion_class_is_refused(tmp_path):
    (tmp_path / "walk").mkdir()
    write_video(tmp_path / "walk" / "a.mp4", moving_square(40, [0] * 16), 8)
    with pytest.raises(UserError, match=r"data\.motion_classes: run is not among the classes of the videos: walk"):
        ClipDataset(tmp_path, 16, 8, 64, background_swap=0.5, motion_classes=["run"])


def test_several_clips_per_video(clips):
    data = ClipDataset(clips / "ucf101", **SHAPE, train=False, clips_per_video=3)
    starts = {index: data[index]["start"] for index in range(len(data))}
    assert len(data) == 6 and starts[0] < starts[2] < starts[4] and data[2]["path"] == data[0]["path"]
    centered = ClipDataset(clips / "ucf101", **SHAPE, clips_per_video=3).centered()
    assert len(centered) == 2 and centered[1]["start"] == starts[3] and centered.classes == data.classes


def test_workers_give_the_samples_of_one_process(broken):
    def batches(**how) -> list[dict]:
        data = ClipDataset(broken, **SHAPE, seed=5)
        sampler = [(epoch, index) for epoch in range(2) for index in range(len(data))]
        return list(DataLoader(data, batch_size=4, sampler=sampler, collate_fn=collate_clips, **how))

    alone, workers = batches(), batches(num_workers=2)
    assert len(alone) == len(workers) == 5
    for a, b in zip(alone, workers, strict=True):
        assert torch.equal(a["video"], b["video"]) and a["path"] == b["path"] and a["skipped"] == b["skipped"]
    assert not torch.equal(alone[0]["video"], alone[3]["video"])  # the epoch reached the workers


# --- unusable videos -------------------------------------------------------------------------------------------------


def test_bad_videos_are_replaced_and_reported(broken):
    data = ClipDataset(broken, **SHAPE)
    samples = [data[i] for i in range(len(data))]
    assert [Path(s["path"]).stem for s in samples] == list("bbddffhhjj")
    assert [s["index"] for s in samples] == list(range(10))
    for sample in samples:
        assert sample["video"].std() > 0.05
        assert [Path(path).stem for path, _ in sample["skipped"]] == (
            [] if Path(sample["path"]).stem == "abcdefghij"[sample["index"]] else ["abcdefghij"[sample["index"]]]
        )
    batch = collate_clips([*samples, *samples])
    reasons = {Path(path).stem: reason for path, reason in batch["skipped"]}
    assert batch["own"].tolist() == [False, True] * 10
    assert len(batch["skipped"]) == 5 and list(reasons) == list("acegi")
    assert "not a readable video" in reasons["a"] and reasons["c"] == "the file is empty"
    assert reasons["e"].startswith("cut off: ") and "decoded" in reasons["g"]
    assert reasons["i"] == "too short: it lasts 0.50 s, 8 frames at 8 fps need more than 0.88 s"
    found = {Path(path).stem for path, _ in data.check()}
    assert found == set("acei")  # decoding reveals the damage inside g


def test_last_video_is_replaced_by_the_first(broken):
    (broken / "k.mp4").write_bytes(b"")
    sample = ClipDataset(broken, **SHAPE)[10]
    assert Path(sample["path"]).stem == "b"
    assert [Path(path).stem for path, _ in sample["skipped"]] == ["k", "a"]


def test_deleted_video_is_skipped(broken):
    data = ClipDataset(broken, **SHAPE)
    (broken / "b.mp4").unlink()
    assert data[1]["skipped"][0] == (str(broken / "b.mp4"), "no such file")


def test_no_readable_video_raises(tmp_path):
    touch(tmp_path, "a.mp4", "b.mp4")
    with pytest.raises(VideoError, match=f"^no readable video under {tmp_path}: {tmp_path}/a.mp4: the file is empty"):
        ClipDataset(tmp_path, **SHAPE)
    with pytest.raises(VideoError, match="no readable video among the 0 listed: it is empty"):
        ClipDataset([], **SHAPE)


def test_no_decodable_video_raises_while_reading(broken):
    for path in broken.iterdir():
        if path.stem != "g":
            path.unlink()
    data = ClipDataset(broken, **SHAPE)
    with pytest.raises(VideoError, match=r"no readable video under .*g.mp4: .*decoded"):
        data[0]


def test_construction_does_not_open_every_file(sprites, monkeypatch):
    opened = []
    real = module.probe
    monkeypatch.setattr(module, "probe", lambda path: opened.append(path) or real(path))
    ClipDataset(sprites, **SHAPE)
    assert len(opened) == 1


def test_bad_videos_are_listed_once_even_after_a_restart(tmp_path):
    file = tmp_path / "run" / "bad_videos.jsonl"
    record = BadVideos(file)
    assert record.count == 0 and not file.exists()
    assert record.add([("a.mp4", "the file is empty"), ("a.mp4", "the file is empty")]) == 1
    assert record.add([("a.mp4", "the file is empty"), ("b.mp4", "too short")]) == 1
    again = BadVideos(file)
    assert again.count == 2 and again.add([("b.mp4", "too short")]) == 0 and again.add([("ç.mp4", "x")]) == 1
    entries = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert [entry["path"] for entry in entries] == ["a.mp4", "b.mp4", "ç.mp4"]
    assert entries[0] == {"path": "a.mp4", "reason": "the file is empty"}


# --- transforms ------------------------------------------------------------------------------------------------------


def test_frames_and_clips_are_inverse():
    frames = torch.arange(256, dtype=torch.uint8).reshape(2, 1, 128, 1, 1).expand(2, 3, 128, 4, 3)
    clip = frames_to_clip(frames)
    assert clip.shape == (2, 3, 3, 128, 4) and clip.min() == -1 and clip.max() == 1
    assert torch.equal(clip_to_frames(clip), frames)
    assert torch.equal(clip_to_frames(torch.tensor([-3.0, 3.0]).reshape(1, 1, 1, 2)).flatten(), torch.tensor([0, 255]))
    with pytest.raises(ValueError, match="NaN"):
        clip_to_frames(clip * float("nan"))
