"""Shards: equal to the folder of videos that they were written from; errors of damaged shards."""

from __future__ import annotations

import io
import json
import re
import shutil
import tarfile
from pathlib import Path

import pytest
import torch
from video_makers import encode

from vidgen.common.errors import UserError
from vidgen.data.dataset import ClipDataset
from vidgen.data.listing import list_videos
from vidgen.data.shards import write_shards
from vidgen.data.types import ShardMember
from vidgen.data.video import VideoError, probe, read_clip

SHAPE = dict(num_frames=8, fps=8, resolution=32)


@pytest.fixture(scope="module")
def shards(sprites, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "shards"
    files, classes = list_videos(sprites)
    assert write_shards(files, classes, folder, max_count=6) == []
    return folder


@pytest.fixture
def copied(shards, tmp_path) -> Path:
    """Shards that a test may change."""
    return Path(shutil.copytree(shards, tmp_path / "copied"))


def tar(path: Path, members: dict[str, bytes]) -> Path:
    """Write a tar file, as other programs do."""
    with tarfile.open(path, "w") as file:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            file.addfile(entry, io.BytesIO(content))
    return path


def same(a: dict, b: dict) -> bool:
    return torch.equal(a["video"], b["video"]) and all(a[key] == b[key] for key in ("label", "start", "index"))


def test_shards_hold_the_files_byte_for_byte(sprites, shards):
    assert sorted(path.name for path in shards.iterdir()) == [
        "index.json", "shard-000000.tar", "shard-000001.tar", "shard-000002.tar",
    ]  # fmt: skip
    files, classes = list_videos(shards)
    originals, named = list_videos(sprites)
    assert classes == named and [file.label for file in files] == [file.label for file in originals]
    for file, original in zip(files, originals, strict=True):
        member = file.path
        content = member.shard.read_bytes()[member.offset : member.offset + member.size]
        assert content == original.path.read_bytes()
        assert str(member) == f"{member.shard}/{member.name}" and original.path.stem in member.name


def test_webdataset_reads_the_shards(sprites, shards):
    import webdataset

    paths = [str(path) for path in sorted(shards.glob("*.tar"))]
    samples = list(webdataset.WebDataset(paths, shardshuffle=False).decode("rgb8"))
    files, classes = list_videos(sprites)
    assert [s["json"] for s in samples] == [
        {"path": str(path), "label": label, "class": classes[label]} for path, label in files
    ]
    index = json.loads((shards / "index.json").read_text())
    assert index["wids_version"] == 1 and [shard["nsamples"] for shard in index["shardlist"]] == [6, 6, 4]


@pytest.mark.parametrize("train", [True, False])
def test_clips_equal_those_of_the_folder(sprites, shards, train):
    plain, sharded = (ClipDataset(root, **SHAPE, train=train, flip=True, seed=3) for root in (sprites, shards))
    assert len(plain) == len(sharded) == 16
    for index in (11, 0, 15, 3):  # in any order
        assert same(plain[2, index], sharded[2, index])
        assert sharded[index]["path"] == str(sharded.files[index].path)


def test_every_way_to_name_shards(shards, monkeypatch):
    every, _ = list_videos(shards)
    monkeypatch.chdir(shards.parent)
    for root, count in [
        (shards / "index.json", 16),
        (f"{shards}/shard-{{000000..000002}}.tar", 16),
        (f"{shards}/shard-*.tar", 16),
        ("shards/shard-00000[01].tar", 12),
        (shards / "shard-000001.tar", 6),
        ("shards", 16),
    ]:
        files, _ = list_videos(root)
        assert len(files) == count and {file.path.name for file in files} <= {file.path.name for file in every}
    with pytest.raises(UserError, match=r"^no shard at .*shard-000003\.tar$"):
        list_videos(f"{shards}/shard-{{000000..000003}}.tar")


def test_shards_of_other_programs(tmp_path, frames, sprites):
    video = next(sprites.rglob("*.mp4")).read_bytes()
    avi = encode(tmp_path / "a.avi", frames, "mpeg4").read_bytes()
    tar(tmp_path / "b.tar", {"x/1.mp4": video, "x/1.cls": b"7\n", "x/2.AVI": avi, "x/2.cls": b"10", "x/3.txt": b"-"})
    tar(tmp_path / "c.tar", {"4.json": b'{"label": 9}', "4.mp4": video, "5.mp4": video, "6.json": b"[]"})
    files, classes = list_videos(tmp_path)
    assert classes == ["7", "9", "10"] and [file.label for file in files] == [0, 2, 1, None]
    assert [file.path.name for file in files] == ["x/1.mp4", "x/2.AVI", "4.mp4", "5.mp4"]
    assert probe(files[1].path).codec == "mpeg4" and probe(files[0].path).num_frames == 16
    assert torch.equal(
        read_clip(files[1].path, fps=25, num_frames=48), read_clip(tmp_path / "a.avi", fps=25, num_frames=48)
    )


def test_hidden_members_and_macos_metadata_are_ignored(tmp_path, sprites):
    video = next(sprites.rglob("*.mp4")).read_bytes()
    hidden = {"./._1.mp4": b"\0\5\26\7", "__MACOSX/._1.mp4": b"x", "__MACOSX/2.mp4": b"x", "a/.b/3.mp4": b"x"}
    tar(tmp_path / "a.tar", {**hidden, "./._1.json": b'{"class": "wrong"}', "./1.mp4": video})
    files, classes = list_videos(tmp_path / "a.tar")
    assert [file.path.name for file in files] == ["./1.mp4"] and classes == []


def test_folders_in_shards_are_classes_without_other_labels(tmp_path):
    members = {"UCF-101/run/1.mp4": b"", "./jump/2.avi": b"", "3.mp4": b""}
    tar(tmp_path / "a.tar", members)
    files, classes = list_videos(tmp_path / "a.tar")
    assert classes == ["jump", "run"] and [file.label for file in files] == [1, 0, None]
    tar(tmp_path / "a.tar", {**members, "3.cls": b"sing"})  # with a label, folders are not classes
    files, classes = list_videos(tmp_path / "a.tar")
    assert classes == ["sing"] and [file.label for file in files] == [None, None, 0]


@pytest.mark.parametrize(
    ("sidecar", "name"),
    [
        ({"1.json": b'{"class": null, "label": 3}'}, "3"),
        ({"1.json": b'{"class": "", "label": " run "}'}, "run"),
        ({"1.JSON": b'{"class": "run"}'}, "run"),
        ({"1.CLS": b" run\n"}, "run"),
        ({"1.json": b'{"class": "run"}', "1.cls": b"7"}, "run"),
        ({"1.cls": b" \n"}, None),
    ],
)
def test_sidecar_files_name_the_class(tmp_path, sidecar, name):
    tar(tmp_path / "a.tar", {"1.mp4": b"", **sidecar})
    files, classes = list_videos(tmp_path / "a.tar")
    assert classes == ([] if name is None else [name]) and len(files) == 1


def test_links_in_shards(tmp_path, sprites):
    video = next(sprites.rglob("*.mp4"))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "1.mp4").write_bytes(video.read_bytes())
    (tmp_path / "run" / "2.mp4").hardlink_to(tmp_path / "run" / "1.mp4")
    (tmp_path / "run" / "3.mp4").symlink_to("1.mp4")
    with tarfile.open(tmp_path / "a.tar", "w") as file:
        for number in (1, 2, 3):
            file.add(tmp_path / "run" / f"{number}.mp4", f"run/{number}.mp4")
    lines = []
    files, _ = list_videos(tmp_path / "a.tar", lines.append)
    assert [file.path.name for file in files] == ["run/1.mp4", "run/2.mp4"]
    assert torch.equal(*(read_clip(file.path, fps=8, num_frames=4) for file in files))
    assert "ignored links in shards: 1 (run/3.mp4)" in lines[0]


@pytest.mark.parametrize(
    ("pattern", "folder"), [("*.mp4", "."), ("s/*/*.mp4", "s"), ("s/*", "s"), ("s/{run,jump}", "s"), ("n/*.AVI", "n")]
)
def test_error_for_a_pattern_of_videos_names_the_folder(tmp_path, monkeypatch, pattern, folder):
    monkeypatch.chdir(tmp_path)
    for name in ("run", "jump"):
        (tmp_path / "s" / name).mkdir(parents=True)
        (tmp_path / "s" / name / "1.mp4").touch()
    with pytest.raises(
        UserError, match=rf"is a pattern of videos or .*the folder that holds them, {re.escape(folder)},"
    ):
        list_videos(pattern)
    with pytest.raises(UserError, match=r"^s/\{run,jump has braces that do not match$"):
        list_videos("s/{run,jump")


def test_folders_of_videos_beside_their_archive_are_rejected(tmp_path, shards):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "1.mp4").touch()
    tar(tmp_path / "all.tar", {"run/1.mp4": b""})
    with pytest.raises(UserError, match=r"holds both folders of videos \(such as run/1.mp4\) and .*all.tar"):
        list_videos(tmp_path)
    assert list_videos(f"{tmp_path}/*.tar")[1] == ["run"]
    copied = Path(shutil.copytree(shards, tmp_path / "copied"))
    shutil.copytree(tmp_path / "run", copied / "run")
    lines = []
    assert len(list_videos(copied, lines.append)[0]) == 16  # with an index, the shards are used
    assert "ignored videos beside the shards: 1 (run/1.mp4)" in lines[0]


def test_files_that_shards_would_not_list_are_left_out(tmp_path, sprites):
    video = next(sprites.rglob("*.mp4"))
    for name in ("1.dat", "2", "3.mp4"):
        shutil.copy(video, tmp_path / name)
    (tmp_path / "4.ts").write_text("export {}")
    files = [(tmp_path / name, None) for name in ("1.dat", "2", "3.mp4", "4.ts")]
    left_out = write_shards(files, [], tmp_path / "out")
    assert [Path(path).name for path, _ in left_out] == ["1.dat", "2", "4.ts"]
    assert len(list_videos(tmp_path / "out")[0]) == 1


def test_unusual_file_names(tmp_path, frames):
    path = tmp_path / "100%, it's {a}: v1.2.MP4"
    encode(tmp_path / "a.mp4", frames).rename(path)
    write_shards([(path, 0)], ["a b"], tmp_path / "50% of, it")
    files, classes = list_videos(tmp_path / "50% of, it")
    assert classes == ["a b"] and files[0].path.name == "00000000-100%, it's {a}: v1_2.mp4"
    assert read_clip(files[0].path, fps=8, num_frames=4).shape == (4, 64, 64, 3)
    assert read_clip(path, fps=8, num_frames=4).shape == (4, 64, 64, 3)


def test_shards_from_shards_are_deterministic(shards, tmp_path):
    files, classes = list_videos(shards)
    for name in ("a", "b", "a"):  # the second time it replaces its output
        write_shards(files, classes, tmp_path / name, shard_size_mb=0.03)
    first, second = (sorted((tmp_path / name).iterdir()) for name in "ab")
    assert len(first) > 3 and [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    again = [
        member.shard.read_bytes()[member.offset :][: member.size] for (member, _) in list_videos(tmp_path / "a")[0]
    ]
    assert again == [member.shard.read_bytes()[member.offset :][: member.size] for (member, _) in files]


def test_unreadable_files_are_left_out_and_reported(tmp_path, sprites):
    files, classes = list_videos(sprites)
    missing = files[0]._replace(path=tmp_path / "missing.mp4")
    assert write_shards([missing, *files[1:3]], classes, tmp_path / "out") == [
        (str(missing.path), "No such file or directory")
    ]
    assert len(list_videos(tmp_path / "out")[0]) == 2 and list_videos(tmp_path / "out")[1] == classes
    with pytest.raises(UserError, match=r"no video to write \(.*missing.mp4: No such file"):
        write_shards([missing], classes, tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_writing_is_atomic(tmp_path, sprites):
    files, classes = list_videos(sprites)

    def interrupt(written: int) -> None:
        if written == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shards(files, classes, tmp_path / "out", max_count=2, report=interrupt)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match=r"holds other things \(thesis.tex\)"):
        write_shards(files, classes, tmp_path / "mine")
    with pytest.raises(UserError, match="positive size"):
        write_shards(files, classes, tmp_path / "out", shard_size_mb=0)


@pytest.mark.parametrize("with_index", [True, False])
def test_truncated_shard_raises_when_listed(copied, with_index):
    if not with_index:
        (copied / "index.json").unlink()
    shard = copied / "shard-000001.tar"
    content = shard.read_bytes()
    member = next(file.path for file in list_videos(copied)[0] if file.path.shard == shard)
    reason = "bytes where index.json says" if with_index else "not a whole, uncompressed tar file"
    for cut in (len(content) // 2, member.offset + 100, member.offset - 512, 100):
        shard.write_bytes(content[:cut])
        with pytest.raises(UserError, match=reason) as caught:
            list_videos(copied)
        assert str(shard) in str(caught.value) and "\n" not in str(caught.value)
    shard.write_bytes(b"no tar file at all" * 1000)
    with pytest.raises(UserError, match=reason):
        list_videos(copied)
    shard.unlink()
    if with_index:
        with pytest.raises(UserError, match=r"lists shard-000001.tar, which is missing"):
            list_videos(copied)


def test_invalid_index_is_rejected(copied):
    for content in ("{}", "not json", '{"shardlist": [{"url": "shard-000000.tar", "nsamples": 6}]}'):
        (copied / "index.json").write_text(content)
        with pytest.raises(UserError, match=r"index.json is not an index that `vidgen shards` writes"):
            list_videos(copied)


def test_damaged_member_is_listed_as_bad_video(copied):
    data = ClipDataset(copied, **SHAPE, train=False)
    member = data.files[4].path
    with member.shard.open("r+b") as file:
        file.seek(member.offset)
        file.write(bytes(member.size))
    sample = data[4]
    assert sample["path"] == str(data.files[5].path)
    (path, reason), *_ = sample["skipped"]
    assert path == str(member) and "not a readable video" in reason


def test_shard_truncated_during_training_is_listed(copied):
    data = ClipDataset(copied, **SHAPE, train=False)
    member = data.files[5].path  # the last of the first shard
    with member.shard.open("r+b") as file:
        file.truncate(member.offset + member.size - 1)
    (path, reason), *_ = data[5]["skipped"]
    assert path == str(member) and reason.startswith("its shard is cut off")
    member.shard.unlink()
    assert data[3]["skipped"][0][1] == "no such file"
    with pytest.raises(VideoError, match="the file is empty"):
        probe(ShardMember(data.files[9].path.shard, "a.mp4", 512, 0))
