"""Listing data sets: video files, CSV dialects, and the summary."""

from __future__ import annotations

import io
import os
import sys
import tarfile
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from vidgen.common.errors import UserError
from vidgen.data.config import DataConfig
from vidgen.data.dataset import ClipDataset
from vidgen.data.file_types import VIDEO_EXTENSIONS
from vidgen.data.listing import find_videos, list_videos
from vidgen.data.splits import list_train_and_validation, list_training_videos

ANIMATED = [Image.fromarray(np.full((16, 16, 3), 40 * i, np.uint8)) for i in range(5)]
TRANSPORT_STREAM = b"G@\0\x10" + bytes(range(184)) * 10


def touch(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"\0")
    return root


def summary(root: Path | str) -> list[str]:
    """The lines of a data set's summary; the first without the name of the data set."""
    texts = []
    list_videos(root, texts.append)
    (text,) = texts
    return text.removeprefix(f"{root}: ").split("\n  ")


def write(path: Path, text: str, encoding: str = "utf-8") -> Path:
    path.write_bytes(text.encode(encoding))
    return path


# --- video files -----------------------------------------------------------------------------------------------------


def test_every_extension_is_found_in_folders_and_shards(tmp_path, sprites):
    content = next(sprites.rglob("*.mp4")).read_bytes()  # FFmpeg and shared extensions go by content
    assert len(VIDEO_EXTENSIONS) > 80
    root = tmp_path / "data"
    (root / "run").mkdir(parents=True)
    for number, ending in enumerate(sorted(VIDEO_EXTENSIONS)):
        (root / "run" / f"{number}{ending.upper() if number % 2 else ending}").write_bytes(content)
    with tarfile.open(tmp_path / "all.tar", "w") as tar:
        tar.add(root / "run", "run")
    for where in (root, tmp_path / "all.tar"):
        files, classes = list_videos(where)
        assert len(files) == len(VIDEO_EXTENSIONS) and classes == ["run"]
        assert ClipDataset(files, 4, 8, 32).check() == []


def test_extensions_of_all_ffmpeg_writers_are_known():
    writers = (
        "mp4 mov 3gp 3g2 f4v ismv avi asf flv matroska webm ogv ogg nut rm wtv mpeg mpegts mpeg1video mpeg2video vob "
        "mxf gxf dv gif apng avif webp mjpeg yuv4mpegpipe ivf obu h261 h264 hevc vc1 amv roq"
    )
    endings = {ending for name in writers.split() for ending in av.format.ContainerFormat(name, "w").extensions}
    assert {f".{ending}" for ending in endings - {"wma", "ra", "isma"}} <= VIDEO_EXTENSIONS


def images(ending: str, **options) -> dict[str, bytes]:
    """A still image and an animation."""
    still, moving = io.BytesIO(), io.BytesIO()
    ANIMATED[0].save(still, ending)
    ANIMATED[0].save(moving, ending, save_all=True, append_images=ANIMATED[1:], duration=100, **options)
    return {"still": still.getvalue(), "moving": moving.getvalue()}


def test_files_with_shared_extensions_are_recognized_by_content(tmp_path):
    root = tmp_path / "data"
    kept = {
        "run/a.gif": images("GIF")["moving"],
        "run/b.webp": images("WEBP")["moving"],
        "run/c.apng": images("PNG")["moving"],
        "run/d.avif": b"\0\0\0\x20ftypavis\0\0\0\0",
        "run/e.ts": TRANSPORT_STREAM,
        "run/f.mts": bytes(4) + TRANSPORT_STREAM,
        "run/g.ogg": b"OggS\0\2" + bytes(22) + b"\x80theora",
        "run/h.gif": b"GIF89a",  # damaged: reported when it is read
        "run/i.ts": b"",
    }
    left_out = {
        "run/j.gif": images("GIF")["still"],
        "run/k.webp": images("WEBP")["still"],
        "run/kk.webp": b"RIFF\x1a\0\0\0WEBPVP8X\x0a\0\0\0\x10" + bytes(9),  # a still image with transparency
        "run/l.apng": images("PNG")["still"],
        "run/m.avif": b"\0\0\0\x20ftypavif\0\0\0\0",
        "run/n.ts": b"export const frames: number[] = [];\n",
        "run/o.mts": "// café\n".encode(),
        "run/p.ogg": b"OggS\0\2" + bytes(22) + b"\1vorbis" + bytes(20),
        "run/q.asf": b":version 1.10\n",
        "run/r.txt": b"",
        "run/s.mp4.json": b"{}",
        "run/t": b"",
    }
    (root / "run").mkdir(parents=True)
    with tarfile.open(tmp_path / "all.tar", "w") as tar:
        for name, content in (kept | left_out).items():
            (root / name).write_bytes(content)
            tar.add(root / name, name)
    assert [path.relative_to(root).as_posix() for path in find_videos(root)] == list(kept)
    assert [file.path.name for file in list_videos(tmp_path / "all.tar")[0]] == list(kept)
    others, contents = summary(root)[1:]
    assert others == "ignored files with other extensions: 3 (.json, .txt, no extension)"
    assert contents == ("ignored files that hold text, a still image or only audio: 9 (j.gif, k.webp, kk.webp, ...)")


# --- folders ---------------------------------------------------------------------------------------------------------


def test_summary_notes_everything_unexpected(tmp_path):
    root = touch(tmp_path / "data", *(f"{name}/1.mp4" for name in "abcdefg"), "__MACOSX/a/1.mp4", ".git/x.txt")
    assert summary(root) == ["7 videos, 7 classes (a, b, c, d, e, ...)"]
    touch(root, "stray.mp4", "test/b/2.mp4", "test/a/2.mp4", "notes.txt", "data.zip", "list.txt")
    (root / "h" / "deep").mkdir(parents=True)
    (root / "a" / "3.mp4").symlink_to("nowhere")
    (root / "b" / "3.mp4").symlink_to("1.mp4")
    (root / "loop").symlink_to(root)
    (root / "self").symlink_to("self")
    assert summary(root) == [
        "12 videos, 7 classes (a, b, c, d, e, ...)",
        "videos outside the class folders, without class: 1 of 12 (stray.mp4)",
        "class names of several folders, merged into one class: 2 (a, test/a)",
        "folders without videos: 1 (h)",
        "ignored files with other extensions: 4 (.txt, .zip, no extension)",
        f"missing videos: 1 of 12 ({root}/a/3.mp4)",
        f"videos listed more than once: 1 ({root}/b/1.mp4)",
    ]
    assert summary(root / "c") == ["1 video, no classes"]
    touch(root, "stray2.mp4", "test/3.mp4")
    assert "class folders that hold other class folders beside videos: 1 (test)" in summary(root)
    assert "videos outside the class folders, without class: 2 of 14 (stray.mp4, stray2.mp4)" in summary(root)


def test_captions_of_videos_are_not_ignored_files(tmp_path):
    captions = ["run/1.txt", "run/2.b.txt"]
    root = touch(tmp_path / "data", "run/1.mp4", "run/2.b.mp4", *captions)
    assert summary(root) == ["2 videos, 1 class (run)"]
    touch(root, "1.txt", "run/1.txt.bak", "run/2.txt", "run/1.md", "run/3.gif", "run/3.txt")
    (root / "run" / "3.gif").write_bytes(images("GIF")["still"])
    assert summary(root)[1] == "ignored files with other extensions: 5 (.txt, .bak, .md)"

    root = touch(tmp_path / "members", "run/1.mp4", "run/2.mp4", "run/1.txt", "run/2.TXT", "run/3.txt", "run/1.b.txt")
    with tarfile.open(tmp_path / "shard.tar", "w") as tar:
        for path in sorted(root.rglob("*.*"), reverse=True):  # texts before and after their videos
            tar.add(path, path.relative_to(root))
        tar.add(root / "run" / "2.TXT", "run/4.txt")
        tar.add(root / "run" / "2.mp4", "run/4.mp4")
    ignored = "ignored files with other extensions: 2 (.txt)"
    assert summary(tmp_path / "shard.tar") == ["3 videos, 1 class (run)", ignored]


def test_unreadable_folders_are_noted(tmp_path, monkeypatch):
    root = touch(tmp_path, "a/1.mp4", "b/2.mp4")
    scandir = os.scandir

    def refuse(path):
        if Path(path).name == "b":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert f"folders that cannot be read: 1 ({root}/b: Permission denied)" in summary(root)


def test_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    touch(tmp_path, "data/run/1.mp4")
    write(tmp_path / "a.csv", "path,label\n~/data/run/1.mp4,run\n")
    for root in ("~/data", Path("~/data"), "~/a.csv"):
        assert [file.path for file in list_videos(root)[0]] == [tmp_path / "data/run/1.mp4"]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
def test_names_that_are_not_utf8(tmp_path):
    folder = os.fsencode(tmp_path)
    os.makedirs(folder + b"/run")
    for name in (b"/run/caf\xe9.mp4", b"/run/\xe9.z\xe9"):
        open(folder + name, "wb").close()
    assert summary(tmp_path)[0] == "1 video, 1 class (run)"
    "\n".join(summary(tmp_path)).encode()  # can be printed
    os.rename(folder + b"/run", folder + b"/caf\xe9")
    with pytest.raises(UserError, match=r"the class name 'caf\\udce9' is not UTF-8") as caught:
        list_videos(tmp_path)
    str(caught.value).encode()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a.mp4", r"a\.mp4 is a single video, not a dataset; name the folder that holds it: "),
        ("a.tar.gz", r"a\.tar\.gz is not a dataset but a compressed archive"),
        ("empty/b.txt", r"no video in .*empty: .*; ignored files with other extensions: 1 \(\.txt\)"),
    ],
)
def test_errors_for_files_that_are_no_dataset(tmp_path, name, message):
    touch(tmp_path, name)
    with pytest.raises(UserError, match=message):
        list_videos(tmp_path / Path(name).parts[0])


@pytest.mark.parametrize("fps", [0, -1, float("nan"), float("inf")])
def test_rate_must_be_positive_and_finite(sprites, fps):
    with pytest.raises(UserError, match="a positive fps"):
        ClipDataset(sprites, 4, fps, 32)


# --- CSV files -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "path,label\na.mp4,two words\nb.mp4,run\n",
        "path,class\na.mp4,two words\nb.mp4,run\n",
        "PATH,Label\na.mp4,two words\nb.mp4,run\n",
        "path;label\r\na.mp4;two words\r\nb.mp4;run\r\n",
        "path\tClass\na.mp4\ttwo words\nb.mp4\trun\n",
        "\ufeffpath , label\t\n\n a.mp4 , two words \nb.mp4\t,run\u00a0\n ,\n",
        '"path","label"\n"a.mp4" , "two words" \n"b.mp4",run\n',
        "label,path,\ntwo words,a.mp4,\nrun,b.mp4\n",
        ",path,label\n0,a.mp4,two words\n1,b.mp4,run\n",  # as pandas writes it, with its index
    ],
)
@pytest.mark.parametrize("name", ["x.csv", "x.TSV"])
def test_csv_dialects(tmp_path, text, name):
    root = touch(tmp_path, "a.mp4", "b.mp4")
    files, classes = list_videos(write(root / name, text))
    assert classes == ["run", "two words"] and files == [(root / "a.mp4", 1), (root / "b.mp4", 0)]
    assert summary(root / name) == ["2 videos, 2 classes (run, two words)"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path,emotion\na.mp4,glad\n", "has no column 'label' or 'class' beside 'path', only emotion: rename"),
        ("path,width,height\na.mp4,4,4\n", "has no column 'label' or 'class' beside 'path', only width, height: "),
        ("path,\na.mp4,run\n", "only one without a name: rename"),
        ("path\na.mp4,run\n", "line 2 has 2 fields and the header 1: name every column"),
        ("path,label\na,b.mp4,run\n", "line 2 has 3 fields and the header 2"),
        ("path,label,class\na.mp4,0,run\n", "both a column 'label' and a column 'class'; keep"),
        ("path,Label,label\na.mp4,0,run\n", "has 2 columns 'label'; keep one"),
        ('path,label\n"a.mp4,run\nb.mp4,run\n', "a quote is not closed in the lines up to 3"),
        ("a.mp4,run\n", "has no column 'path': its first line should read path,label"),
        ("path label\na.mp4 run\n", "has no column 'path'"),
        ("path,label\n", "no video in .*: expected a first line path,label and a line for each video"),
    ],
)
def test_csv_that_would_lose_classes_or_rows_is_rejected(tmp_path, text, message):
    with pytest.raises(UserError, match=message) as caught:
        list_videos(write(tmp_path / "a.csv", text))
    assert "\n" not in str(caught.value) and "a.csv" in str(caught.value)


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_csv_in_another_encoding_is_rejected(tmp_path, encoding):
    with pytest.raises(UserError, match="is not a CSV file in UTF-8"):
        list_videos(write(tmp_path / "a.csv", "path,label\na.mp4,café\n", encoding))


def test_summary_notes_gaps_and_repetitions_of_a_csv(tmp_path):
    root = touch(tmp_path, "a.mp4", "b.mp4", "c.mp4")
    table = write(
        root / "x.csv",
        "path,label,split\na.mp4,run,train\nb.mp4,,test\n./b.mp4,,\n,run,\nc.mp4\nsub/../a.mp4,jump\nd.mp4,run\n",
    )
    (root / "sub").mkdir()
    assert summary(table) == [
        "6 videos, 2 classes (jump, run)",
        "unused columns: 1 (split)",
        "ignored rows without a path: 1",
        "videos without class: 3 of 6",
        f"missing videos: 1 of 6 ({root}/d.mp4)",
        f"videos listed more than once: 2 ({root}/a.mp4, ...)",
        f"videos listed with different classes: 1 ({root}/a.mp4: jump, run)",
    ]
    assert summary(write(root / "y.csv", "path,label\na.mp4,\n")) == ["1 video, no classes"]


def test_paths_written_on_windows(tmp_path):
    root = touch(tmp_path, "a/b/1.mp4", "c\\2.mp4")
    files, _ = list_videos(write(root / "x.csv", "path\na\\b\\1.mp4\nc\\2.mp4\n"))
    assert [file.path for file in files] == [root / "a/b/1.mp4", root / "c\\2.mp4"]


def test_equal_numbers_have_a_fixed_order(tmp_path):
    table = write(
        tmp_path / "x.csv", "path,label\n" + "".join(f"a.mp4,{label}\n" for label in ("1", "001", "01", "0"))
    )
    assert list_videos(table)[1] == ["0", "001", "01", "1"]


# --- training and validation -----------------------------------------------------------------------------------------


def test_config_reports_each_data_set_and_rejects_one_without_files(tmp_path):
    root = touch(tmp_path / "train", *(f"{name}/{n}.mp4" for name in ("a", "b") for n in range(5)))
    other = touch(tmp_path / "validation", "b/1.mp4", "c/1.mp4")
    texts = []
    data = DataConfig(root=str(root), validation_root=str(other))
    train, validation, classes = list_train_and_validation(data, 0, texts.append)
    assert [text.split(": ")[1] for text in texts] == ["10 videos, 2 classes (a, b)", "2 videos, 2 classes (b, c)"]
    assert classes == ["a", "b"] and len(train) == 10
    assert [file.label for file in validation] == [1, None]  # among the classes of training
    texts.clear()
    assert list_training_videos(data, texts.append) == list_videos(root) and len(texts) == 1
    table = write(tmp_path / "x.csv", "path,label\nq/1.mp4,a\nq/2.mp4,b\n")
    for broken in (DataConfig(root=str(table)), DataConfig(root=str(root), validation_root=str(table))):
        with pytest.raises(UserError, match=r"none of its videos exists, the first would be .*q/1.mp4; paths"):
            list_train_and_validation(broken, 0)
    with pytest.raises(UserError, match="none of its videos exists"):
        list_training_videos(DataConfig(root=str(table)))
