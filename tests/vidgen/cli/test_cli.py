"""The `vidgen` command: help, errors and interrupts, and the commands that convert models and handle datasets."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import fail
from PIL import Image

from autoencoder import AutoencoderKLVidTwin
from vidgen.cli import build_parser, main


def test_every_option_has_help():
    parser = build_parser()
    text = parser.format_help()
    commands = parser._subparsers._group_actions[0].choices
    assert list(commands) == [
        "encode", "decode", "reconstruct", "reenact", "components", "generate", "convert", "shards",
        "sprites", "data", "fvd", "evaluate", "latents", "runs", "app", "info",
    ]  # fmt: skip
    for name, command in commands.items():
        assert name in text
        below = command._subparsers._group_actions[0].choices.values() if command._subparsers else [command]
        for action in (action for parser in below for action in parser._actions):
            assert action.help, f"vidgen {name} {action.dest} has no help"


def test_exit_code_and_light_import():
    result = subprocess.run([sys.executable, "-m", "vidgen", "info", "absent"], capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.strip().startswith("error: No VAE in absent") and "Traceback" not in result.stderr
    code = "import sys, vidgen.cli; vidgen.cli.build_parser(); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"


@pytest.mark.parametrize("signal_name", ["SIGINT", "SIGTERM"])
def test_an_interrupt_during_imports_ends_the_command(signal_name, tmp_path, monkeypatch):
    """torch is replaced by a module that swallows a KeyboardInterrupt, as some libraries do."""
    (tmp_path / "torch.py").write_text(
        "import sys, time\n"
        "try:\n    print('importing', file=sys.stderr, flush=True)\n    time.sleep(20)\n"
        "except BaseException:\n    raise RuntimeError('lost')\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    process = subprocess.Popen(
        [sys.executable, "-m", "vidgen", "info", "anything"],
        stderr=subprocess.PIPE,
        text=True,
        # A shell starts background jobs with SIGINT ignored, and child processes inherit this.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stderr.readline() == "importing\n"
    process.send_signal(getattr(signal, signal_name))
    assert process.wait(20) == 130
    assert process.stderr.read() == "interrupted\n"


# --- convert and info -----------------------------------------------------------------------------------------------


def test_convert_and_info(tmp_path, capsys, golden):
    folder = tmp_path / "vae"
    main(["convert", str(golden), str(folder), "--attention-heads", "4", "--qformer-heads", "4"])
    vae = AutoencoderKLVidTwin.from_pretrained(folder)
    capsys.readouterr()
    main(["info", str(folder)])
    out = capsys.readouterr().out
    assert f"{vae.num_parameters():,}" in out and f"{vae.compression_rate:.4%}" in out and "GFLOP" in out
    assert json.loads(out[out.index("{") :])["num_attention_heads"] == 4
    main(["convert", str(golden), str(folder), "--attention-heads", "4", "--qformer-heads", "4"])  # replaces its own
    assert "holds other things (vae)" in fail(capsys, "convert", golden, tmp_path)
    assert "at least 1" in fail(capsys, "convert", golden, tmp_path / "new", "--attention-heads", "0")
    assert "at least 1" in fail(capsys, "convert", golden, tmp_path / "new", "--attention-heads", "-2")
    (tmp_path / "evil.ckpt").write_bytes(b"cos\nsystem\n(S'touch " + str(tmp_path / "ran").encode() + b"'\ntR.")
    assert "evil.ckpt" in fail(capsys, "convert", tmp_path / "evil.ckpt", tmp_path / "new")
    assert not (tmp_path / "ran").exists() and not (tmp_path / "new").exists()


@pytest.fixture
def golden() -> Path:
    return Path(__file__).parents[2] / "data" / "official_golden" / "mini_weights.safetensors"


def test_convert_replaces_only_its_results(tmp_path, capsys, golden):
    """A downloaded folder looks like a model's and holds the checkpoint."""
    for name, content in (("vidtwin.safetensors", golden.read_bytes()), ("config.json", b"{}"), ("notes.txt", b"x")):
        (tmp_path / name).write_bytes(content)
    assert "holds other things" in fail(capsys, "convert", tmp_path / "vidtwin.safetensors", tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "notes.txt", "vidtwin.safetensors"]


# --- data sets ------------------------------------------------------------------------------------------------------


@pytest.fixture
def videos(tmp_path) -> Path:
    """Three sprites of two classes, and a text file with the suffix of a video."""
    from vidgen.data.sprites import write_sprites

    write_sprites(tmp_path / "all", 2, seed=0)
    root = tmp_path / "videos"
    for number, path in enumerate(
        sorted(tmp_path.glob("all/*/orbit*.mp4")) + sorted(tmp_path.glob("all/*/spin_0000.mp4"))
    ):
        (root / path.parent.name).mkdir(parents=True, exist_ok=True)
        path.rename(root / path.parent.name / f"{number}.mp4")
    (root / "spin" / "text.mp4").write_text("no video")
    return root


def test_sprites_are_written_by_seed(tmp_path, capsys):
    main(["sprites", str(tmp_path / "few"), "--clips-per-class", "1", "--seed", "3"])
    assert capsys.readouterr().out == f"8 clips in {tmp_path / 'few'}\n"
    main(["sprites", str(tmp_path / "more"), "--clips-per-class", "2", "--seed", "3", "--captions"])
    tables = [tmp_path / "more" / f"captions_{part}.csv" for part in ("seen", "held_out")]
    assert sum(len(table.read_text().splitlines()) - 1 for table in tables) == 16
    assert not list((tmp_path / "few").glob("captions*"))
    few, more = ({p.name: p.read_bytes() for p in (tmp_path / n).glob("*/*")} for n in ("few", "more"))
    assert len(few) == 16 and len(more) == 32 and few.items() <= more.items()
    main(["sprites", str(tmp_path / "others"), "--clips-per-class", "1", "--seed", "4"])
    assert not few.items() & {p.name: p.read_bytes() for p in (tmp_path / "others").glob("*/*")}.items()
    capsys.readouterr()
    assert "--clips-per-class must be 1 or more" in fail(capsys, "sprites", tmp_path / "x", "--clips-per-class", "0")
    assert not (tmp_path / "x").exists()


def test_data_check_lists_counts_and_draws(videos, tmp_path, capsys):
    out = tmp_path / "found"
    main(["data", "check", str(videos), "--output", str(out), "--jobs", "1", "--fps", "8", "--num-frames", "16"])
    printed = " ".join(capsys.readouterr().out.split())
    assert "4 videos, 2 classes" in printed and "│ good │ 3 │" in printed and "│ unreadable │ 1 │" in printed
    (entry,) = [json.loads(line) for line in (out / "bad_videos.jsonl").read_text().splitlines()]
    assert entry["path"] == str(videos / "spin" / "text.mp4") and "not a readable video" in entry["reason"]
    with Image.open(out / "histograms.png") as picture:
        assert picture.size == (1386, 319)


def test_shards_hold_the_dataset(videos, tmp_path, capsys):
    from vidgen.data.listing import list_videos

    main(["shards", str(videos), str(tmp_path / "out"), "--max-count", "3"])
    printed = capsys.readouterr()
    assert printed.out == f"4 videos in 2 shards in {tmp_path / 'out'}\n"
    assert printed.err.startswith(f"{videos}: 4 videos, 2 classes (orbit, spin)\n")
    files, classes = list_videos(tmp_path / "out")
    assert [file.label for file in files] == [0, 0, 1, 1] and classes == ["orbit", "spin"]


def test_shards_of_an_official_split(videos, tmp_path):
    from vidgen.data.listing import list_videos

    lists = tmp_path / "lists"
    lists.mkdir()
    (lists / "classInd.txt").write_text("1 spin\n2 orbit\n")
    (lists / "trainlist02.txt").write_text("orbit/0.mp4 2\nspin/2.mp4 1\n")
    (lists / "testlist02.txt").write_text("orbit/1.mp4\n")
    words = ["shards", str(videos), str(tmp_path / "out"), "--ucf101-split", "2", "--split-files", str(lists)]
    main(words)
    for part, labels in (("train", [1, 0]), ("test", [1])):
        files, classes = list_videos(tmp_path / "out" / part)
        assert [file.label for file in files] == labels and classes == ["spin", "orbit"]


def test_wrong_datasets_are_refused(tmp_path, capsys):
    assert "no dataset at" in fail(capsys, "data", "check", tmp_path / "absent")
    assert "must be positive" in fail(capsys, "data", "check", tmp_path, "--jobs", "0")
    (tmp_path / "a.tar").write_bytes(b"x" * 2000)
    assert "a.tar is not a whole, uncompressed tar file" in fail(capsys, "shards", tmp_path, tmp_path / "out")
