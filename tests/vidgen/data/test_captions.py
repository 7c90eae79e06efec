"""Captions of CSV files, of .txt beside videos and of shards, and their counts."""

from __future__ import annotations

import io
import json
import re
import tarfile
from pathlib import Path

import pytest

from vidgen.cli import main
from vidgen.common.errors import UserError
from vidgen.data.captions import read_captions, read_shard_captions, summarize_captions
from vidgen.data.check import VideoReport
from vidgen.data.listing import data_hash, list_videos
from vidgen.data.shards import write_shards

UNICODE = "Ein Stern 星 dreht sich 🙂"


@pytest.fixture
def folder(tmp_path) -> Path:
    """Four files with the names of videos."""
    for name in ("a", "b", "c", "d"):
        (tmp_path / f"{name}.mp4").write_bytes(name.encode())
    return tmp_path


def captions_of(root: Path | str) -> dict[str, tuple[str, ...]]:
    files, _ = list_videos(root)
    return {
        Path(getattr(f.path, "name", f.path)).name: c for f, c in zip(files, read_captions(root, files), strict=True)
    }


def test_a_csv_has_captions_beside_classes_or_alone(folder):
    table = folder / "list.csv"
    text = f'path,label,Caption\na.mp4,x,"a disc, red"\nb.mp4,y, one  text | {UNICODE} |\nc.mp4,x,\nd.mp4,x\n'
    table.write_text(text, encoding="utf-8")
    expected = {"a.mp4": ("a disc, red",), "b.mp4": ("one text", UNICODE), "c.mp4": ("",), "d.mp4": ("",)}
    notes = []
    assert list_videos(table, notes.append)[1] == ["x", "y"]
    assert captions_of(table) == expected and "unused" not in notes[0]

    table.write_text("path;caption\na.mp4;first\na.mp4;second\n")
    files, classes = list_videos(table)
    assert classes == [] and read_captions(table, files) == [("first", "second")] * 2

    table.write_text("path,caption,caption\na.mp4,x,y\n")
    with pytest.raises(UserError, match="has 2 columns 'caption'; keep one"):
        captions_of(table)
    table.write_text("path,label,caption\na.mp4,x,a disc, red\n")
    with pytest.raises(UserError, match=r"line 2 has 4 fields and the header 3: .* quote fields"):
        list_videos(table)


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_quoted_caption_may_have_line_breaks(folder, end):
    rows = ["path,note,caption,label", f'a.mp4,"x{end}y","a disc,{end} {end}""red""",u', f"b.mp4,,{UNICODE},v"]
    rows += [f'c.mp4,,"one {end}|{end} two{end}",u', ""]
    (folder / "list.csv").write_bytes(end.join(rows).encode())
    expected = {"a.mp4": ('a disc, "red"',), "b.mp4": (UNICODE,), "c.mp4": ("one", "two")}
    assert captions_of(folder / "list.csv") == expected
    assert [file.label for file in list_videos(folder / "list.csv")[0]] == [0, 1, 0]


@pytest.mark.parametrize(
    ("rows", "line"),
    [
        ('a.mp4,u,"a disc\nb.mp4,v,a star', 3),
        ('a.mp4,u,"a disc\nb.mp4,v,"a star"\nc.mp4,u,a ring', 3),
        ('a.mp4,u,"a disc\nb.mp4,v,""', 3),
        ('a.mp4,"u\nb.mp4,v",a star', 3),
        ('"a.mp4\nb.mp4",v,a star', 3),
    ],
)
def test_a_quote_that_is_not_closed_takes_no_rows(folder, rows, line):
    (folder / "list.csv").write_text(f"path,label,caption\n{rows}\n")
    with pytest.raises(UserError, match=rf"list\.csv: a quote is not closed in the lines up to {line}"):
        captions_of(folder / "list.csv")


def test_a_text_beside_a_video_has_a_caption_per_line(folder):
    (folder / "a.txt").write_text(f"\ufeffone\r\n\r\n  {UNICODE}  \n", encoding="utf-8")
    (folder / "b.txt").write_text(" \n\n")
    assert captions_of(folder) == {"a.mp4": ("one", UNICODE), "b.mp4": ("",), "c.mp4": (), "d.mp4": ()}
    (folder / "list.csv").write_text("path,label\na.mp4,x\n")
    assert captions_of(folder / "list.csv") == {"a.mp4": ("one", UNICODE)}
    (folder / "c.txt").write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match=r"c\.txt is not a text of captions in UTF-8"):
        captions_of(folder)
    (folder / "c.txt").write_bytes(b"x" * (1 << 20) + b"y")
    with pytest.raises(UserError, match=r"c\.txt has over 1,048,576 bytes, but should hold the captions of one video"):
        captions_of(folder)


def test_captions_do_not_change_what_latents_depend_on(folder):
    before = data_hash(folder, *list_videos(folder))
    (folder / "a.txt").write_text("a caption")
    assert data_hash(folder, *list_videos(folder)) == before


def test_shards_have_captions_as_text_or_json(folder):
    members = {
        "x/a.mp4": b"a",
        "x/a.txt": f"one\n{UNICODE}".encode(),
        "x/a.json": json.dumps({"caption": "ignored"}).encode(),
        "x/b.mp4": b"b",
        "x/b.json": json.dumps({"caption": ["first", " second "], "label": "y"}).encode(),
        "y/b.mp4": b"c",
        "y/b.json": b"[1]",
        "y/d.mp4": b"d",
        "y/d.json": json.dumps({"caption": None}).encode(),
        "y/e.mp4": b"e",
        "y/e.json": json.dumps({"caption": ""}).encode(),
        "y/f.mp4": b"f",
        "y/f.json": json.dumps({"label": "y"}).encode(),
    }
    shard = write_tar(folder / "shard.tar", members)
    files, _ = list_videos(shard)
    assert read_captions(shard, files) == [("one", UNICODE), ("first", "second"), (), (), ("",), ()]


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return path


@pytest.mark.parametrize("name", ["a.txt", "a.json"])
def test_long_captions_of_a_shard_are_not_cut(tmp_path, name):
    content = json.dumps({"caption": "x" * (1 << 20)}).encode()
    shard = write_tar(tmp_path / "long.tar", {"a.mp4": b"a", name: content})
    with pytest.raises(UserError, match=rf"long\.tar/{name} has over 1,048,576 bytes"):
        read_shard_captions(shard)


@pytest.mark.parametrize("content", [b"", b"{not json", b'{"caption": "a"', '{"caption": "café"}'.encode("latin-1")])
def test_a_broken_json_of_a_shard_is_named(tmp_path, content):
    shard = write_tar(tmp_path / "shard.tar", {"x/a.mp4": b"a", "x/a.json": content})
    with pytest.raises(UserError, match=r"shard\.tar/x/a\.json cannot be read as JSON in UTF-8 \(.*correct it"):
        read_shard_captions(shard)


@pytest.mark.parametrize("value", [5, 0, False, {"a": 1}, [1, "x"], [None]])
def test_a_json_caption_of_another_type_is_named(tmp_path, value):
    content = json.dumps({"caption": value}).encode()
    shard = write_tar(tmp_path / "shard.tar", {"x/a.mp4": b"a", "x/a.json": content})
    expected = f"shard.tar/x/a.json: caption must be a text or a list of texts, not {json.dumps(value)}"
    with pytest.raises(UserError, match=re.escape(expected)):
        read_captions(shard, list_videos(shard)[0])


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("shard.tar/a.json", rb'{"caption": "hi \ud800 there"}'),
        ("shard.tar/a.json", rb'{"caption": ["fine", "\udc00\ud800"]}'),
        ("shard.tar/a.json", b'{"caption": "hi \xed\xa0\x80 there"}'),
        ("shard.tar/a.txt", b"hi \xed\xa0\x80 there"),
        ("a.txt", b"hi \xed\xa0\x80 there"),
        ("list.csv", b"path,caption\na.mp4,hi \xed\xa0\x80 there"),
    ],
)
def test_half_of_a_surrogate_pair_is_refused(folder, name, content):
    root = folder / Path(name).parts[0]
    if root.suffix == ".tar":
        write_tar(root, {"a.mp4": b"a", Path(name).name: content})
    else:
        root.write_bytes(content)
    root = folder if root.suffix == ".txt" else root
    reason = "half of a surrogate pair .* in UTF-8, or" if name.endswith(".json") else r"UTF-8 .*; save it in that"
    with pytest.raises(UserError, match=rf"{re.escape(name)}.* {reason}"):
        read_captions(root, list_videos(root)[0])


def test_both_halves_of_a_surrogate_pair_are_one_character(tmp_path):
    shard = write_tar(tmp_path / "shard.tar", {"a.mp4": b"a", "a.json": rb'{"caption": "\ud83d\ude42"}'})
    assert read_captions(shard, list_videos(shard)[0]) == [("🙂",)]


def test_written_shards_keep_captions(folder, tmp_path_factory):
    (folder / "a.txt").write_text(f"one\n{UNICODE}")
    (folder / "b.txt").write_text("two")
    files, classes = list_videos(folder)
    captions = read_captions(folder, files)
    shards = tmp_path_factory.mktemp("shards") / "out"
    write_shards(files, classes, shards, captions=captions)
    assert read_captions(shards, list_videos(shards)[0]) == captions == [("one", UNICODE), ("two",), (), ()]


def test_missing_empty_and_longest_captions_are_counted(folder):
    for name, text in {"a": "one\nlonger", "b": "", "c": "one"}.items():
        (folder / f"{name}.txt").write_text(text)
    files, _ = list_videos(folder)
    summary = summarize_captions(files, read_captions(folder, files))
    assert (summary.videos, summary.missing, summary.empty, summary.distinct) == (4, 1, 1, 2)
    assert str(summary) == (
        f"captions: 2 different of 4 videos, 1 missing, 1 empty, the longest has 6 characters ({folder / 'a.mp4'})"
    )
    assert str(summarize_captions(files, [()] * 4)) == "captions: none"


def test_data_check_counts_captions(folder, capsys, monkeypatch):
    monkeypatch.setattr("vidgen.data.check.check_videos", lambda paths, **_: map(VideoReport, map(str, paths)))
    (folder / "list.csv").write_text("path,caption\na.mp4,an orbit\nb.mp4,an orbit\nc.mp4,\n")
    main(["data", "check", str(folder / "list.csv"), "--output", str(folder)])
    assert "captions: 1 different of 3 videos, 0 missing, 1 empty, the longest has 8" in capsys.readouterr().out
