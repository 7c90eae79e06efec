"""The official splits of UCF-101: their videos, with the classes in the official order."""

from __future__ import annotations

from pathlib import Path

import pytest

from vidgen.common.errors import UserError
from vidgen.data.config import DataConfig
from vidgen.data.dataset import ClipDataset
from vidgen.data.splits import list_train_and_validation
from vidgen.data.ucf101 import ucf101_split

TRAIN = ["YoYo/v_YoYo_g08_c01.avi 2", "YoYo/v_YoYo_g08_c02.avi 2", "ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi 1"]
TEST = ["ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01.avi", "YoYo/v_YoYo_g01_c01.avi", "YoYo/v_YoYo_g01_c02.avi"]


def make(root: Path, lists: Path) -> Path:
    """A small UCF-101, whose classes the official order does not sort by name."""
    for line in TRAIN + TEST:
        video = root / line.split()[0]
        video.parent.mkdir(parents=True, exist_ok=True)
        video.touch()
    (root / "YoYo" / "v_YoYo_g99_c01.avi").touch()  # on no list
    lists.mkdir()
    (lists / "classInd.txt").write_text("1 YoYo\r\n2 ApplyEyeMakeup\r\n\r\n")
    for split in (1, 3):
        (lists / f"trainlist{split:02}.txt").write_text("\r\n".join(TRAIN[: 3 - split // 3]) + "\r\n")
        (lists / f"testlist{split:02}.txt").write_text("\n".join(TEST))
    return root


@pytest.mark.parametrize("where", ["UCF-101/ucfTrainTestlist", "ucfTrainTestlist"])
def test_split_follows_its_lists(tmp_path, where, monkeypatch):
    (tmp_path / "UCF-101").mkdir()
    root = make(tmp_path / "UCF-101", tmp_path / where)
    train, test, classes = ucf101_split(root, 1)
    assert classes == ["YoYo", "ApplyEyeMakeup"]  # in the order of classInd.txt
    assert [(str(f.path.relative_to(root)), f.label) for f in train] == [
        (line.split()[0], int(line.startswith("Apply"))) for line in TRAIN
    ]
    assert [(str(f.path.relative_to(root)), f.label) for f in test] == [(t, int(t.startswith("Apply"))) for t in TEST]
    assert len(ucf101_split(root, 3)[0]) == 2
    monkeypatch.chdir(root)
    assert len(ucf101_split(".", 1)[0]) == 3


def test_reencoded_and_nested_videos_are_found_and_missing_ones_stay_listed(tmp_path):
    root = make(tmp_path / "all" / "UCF-101", tmp_path / "lists")
    (root / "YoYo" / "v_YoYo_g08_c01.avi").rename(root / "YoYo" / "v_YoYo_g08_c01.mp4")
    (root / "YoYo" / "v_YoYo_g08_c02.avi").unlink()
    train, _, _ = ucf101_split(tmp_path / "all", 1, tmp_path / "lists")
    assert train[0].path == root / "YoYo" / "v_YoYo_g08_c01.mp4" and train[2].path.exists()
    assert not train[1].path.exists() and train[1].path.name == "v_YoYo_g08_c02.avi"


def test_listed_extension_is_preferred(tmp_path):
    root = make(tmp_path / "UCF-101", tmp_path / "lists")
    (root / "YoYo" / "v_YoYo_g08_c01.mp4").touch()  # sorted after the .avi
    assert ucf101_split(root, 1, tmp_path / "lists")[0][0].path == root / "YoYo" / "v_YoYo_g08_c01.avi"


def test_config_trains_on_one_list_and_validates_on_the_other(tmp_path, sprites):
    root = make(tmp_path / "UCF-101", tmp_path / "lists")
    data = DataConfig(root=str(root), ucf101_split=1, split_files=str(tmp_path / "lists"))
    assert list_train_and_validation(data, 0) == ucf101_split(root, 1, tmp_path / "lists")
    data.num_validation_videos = 2
    _, validation, _ = list_train_and_validation(data, 0)
    assert {file.label for file in validation} == {0, 1} and len(validation) == 2
    data.validation_root = str(sprites)
    _, validation, _ = list_train_and_validation(data, 0)
    assert len(validation) == 16
    train, validation, classes = list_train_and_validation(DataConfig(root=str(sprites)), 0)
    assert (len(train), len(validation), len(classes)) == (13, 3, 8)
    with pytest.raises(UserError, match="no readable"):  # the files are empty
        ClipDataset(ucf101_split(root, 1, tmp_path / "lists")[0], 8, 8, 32)


def test_missing_or_malformed_lists_raise(tmp_path):
    root, lists = make(tmp_path / "UCF-101", tmp_path / "lists"), tmp_path / "lists"

    def check_error(message: str, split: int = 1, root: Path = root, split_files: Path | None = lists) -> None:
        with pytest.raises(UserError, match=message) as caught:
            ucf101_split(root, split, split_files)
        assert "\n" not in str(caught.value)

    check_error("UCF-101 has the splits 1, 2 and 3, not 4", split=4)
    check_error(r"trainlist02.txt cannot be read", split=2)
    check_error(rf"no split files at {root}/ucfTrainTestlist or {tmp_path}/ucfTrainTestlist: unpack", split_files=None)
    check_error(r"no split files at .*/absent: ", split_files=tmp_path / "absent")
    check_error(r"needs the folder of its unpacked videos", root=tmp_path / "videos.csv")
    (tmp_path / "empty").mkdir()
    check_error(r"none of the videos of trainlist01.txt is in .*empty", root=tmp_path / "empty")
    (lists / "testlist01.txt").write_text("Juggling/v_Juggling_g01_c01.avi")
    check_error(r"testlist01.txt, line 1: expected CLASS/NAME with a class of classInd.txt")
    (lists / "classInd.txt").write_text("1 YoYo\n1 ApplyEyeMakeup\n")
    check_error(r"classInd.txt, line 2: the number 1 is taken by YoYo")
    (lists / "classInd.txt").write_text("1 YoYo\nApplyEyeMakeup\n")
    check_error(r"classInd.txt, line 2: expected a number and a class, got 'ApplyEyeMakeup'")
