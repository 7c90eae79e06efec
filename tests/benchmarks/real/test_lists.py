"""The lists of real videos."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.real.lists import caption_with_room, write_lists
from vidgen.common.errors import UserError
from vidgen.data.csv_table import read_table


@pytest.fixture
def data(tmp_path) -> Path:
    """Two robot scenes and two gestures."""
    for path, text in {
        "droid/labels.csv": 'path,caption,group\na/1.mp4,"Move the cup, slowly. ",0\nb/2.mp4,Lift it,1\n',
        "droid/train_scene.csv": "path,label\na/1.mp4,industrial_office\n",
        "droid/test_scene.csv": "path,label\nb/2.mp4,living_room\n",
        "egogestar/train.csv": "path,label\nup/1.mp4,up\n",
        "egogestar/test.csv": "path,label\nup/2.mp4,up\n",
    }.items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(text)
    return tmp_path


def test_lists_have_absolute_paths_classes_and_captions_with_rooms(data, tmp_path):
    tables = {table.stem: table for table in write_lists(data, tmp_path / "lists")}
    scene, gesture = tmp_path / "droid" / "a" / "1.mp4", tmp_path / "egogestar" / "up" / "1.mp4"
    assert read_table(tables["vae_train"])[:2] == ([scene] + [gesture] * 2, ["industrial_office", "up", "up"])
    assert read_table(tables["dit_train"])[0] == [scene] + [gesture] * 6
    assert read_table(tables["captions_train"])[0] == [scene]
    assert tables["captions_test"].read_text().splitlines() == [
        "path,label,caption",
        f'{tmp_path}/droid/b/2.mp4,living_room,"Lift it, in a living room"',
    ]
    assert "caption" not in tables["vae_test"].read_text()


def test_a_caption_names_its_room():
    assert (
        caption_with_room("Move the cup, slowly. ", "industrial_office")
        == "Move the cup, slowly, in an industrial office"
    )


@pytest.mark.parametrize(
    ("path", "text", "message"),
    [
        ("droid/labels.csv", None, r"labels\.csv cannot be read"),
        ("droid/labels.csv", "path,task\na/1.mp4,move\n", "needs a first line with the columns path and caption"),
        ("droid/train_scene.csv", "path,label\na/1.mp4\n", "a row needs both path and label: a/1.mp4,None"),
        ("egogestar/train.csv", "file,label\nx,y\n", "needs a first line with the columns path and label"),
        (
            "droid/test_scene.csv",
            "path,label\nc/3.mp4,office\n",
            r"has no row of .*c/3\.mp4, which test_scene\.csv lis",
        ),
    ],
)
def test_missing_tables_columns_and_rows_are_one_sentence(data, path, text, message):
    (data / path).unlink() if text is None else (data / path).write_text(text)
    with pytest.raises(UserError, match=message):
        write_lists(data, data / "lists")
    assert not (data / "lists").exists()
