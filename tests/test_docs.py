"""The guides are true: their Python examples and `vidgen` commands run, all other commands are at least accepted."""

from __future__ import annotations

import argparse
import importlib.util
import re
import runpy
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from autoencoder import adapters
from vidgen.cli import build_parser
from vidgen.cli import main as vidgen
from vidgen.common.config import load_config
from vidgen.common.video_writing import write_video
from vidgen.data.sprites import write_sprites
from vidgen.training.config import DiTTrainingConfig, VAETrainingConfig

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", "CONTRIBUTING.md"]
PAGES += sorted(
    str(path.relative_to(ROOT)) for path in (*ROOT.glob("docs/*.md"), *ROOT.glob("pretrained/*/README.md"))
)
NEEDS_MORE = ["push_to_hub", "vidtwin.ckpt"]  # a Hub account; the authors' weights
if importlib.util.find_spec("peft") is None:
    NEEDS_MORE.append("peft")
PROGRAMS = {
    "train_vae.py": VAETrainingConfig,
    "train_dit.py": DiTTrainingConfig,
    "encode_latents.py": DiTTrainingConfig,
}
# Inputs that the commands name and this machine lacks: weights of others, models to be trained, UCF-101's lists.
ABSENT = re.compile(r"vidtwin|Lightricks/|runs/|--ucf101-split|vidgen app|clips-per-class 1000|/data/|vidgen evaluate")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with the pretrained model and the videos that the commands name."""
    path = tmp_path_factory.mktemp("docs")
    (path / "pretrained").symlink_to(ROOT / "pretrained")
    (path / "MODEL").symlink_to(ROOT / "pretrained" / "sprites")
    videos = write_sprites(path / "FOLDER", 1, seed=0)
    for name in ("UCF-101", "DATASET", "REAL", "FAKE"):
        shutil.copytree(path / "FOLDER", path / name)
    for name, video in zip(("in.mp4", "a.mp4", "b.mp4"), videos, strict=False):
        shutil.copy(video, path / name)
    Image.fromarray((torch.rand(48, 64, 3) * 255).byte().numpy()).save(path / "photo.png")
    write_video(path / "long.mp4", (torch.rand(24, 64, 96, 3) * 255).to(torch.uint8), fps=8)
    return path


def commands(page: str) -> list[str]:
    """The shell commands in indented and fenced blocks of a page, continuation lines joined."""
    text = (ROOT / page).read_text(encoding="utf-8")
    text = re.sub(r"```python\n.*?```", "", text, flags=re.DOTALL)
    lines = re.sub(r"\\\n\s*", " ", text).splitlines()
    blocks = [line.strip() for line in lines if line.startswith("    ")]
    blocks += [
        line for block in re.findall(r"```bash\n(.*?)```", "\n".join(lines), re.DOTALL) for line in block.splitlines()
    ]
    known = re.compile(r"(\.venv/bin/)?(vidgen|accelerate launch|python -m|python \w+/)\b")
    return [line.split(" #")[0].strip() for line in blocks if known.match(line) and "..." not in line]


def of_kind(pattern: str) -> list[tuple[str, str]]:
    found = [(page, line) for page in PAGES for line in commands(page) if re.search(pattern, line)]
    return sorted({line: (page, line) for page, line in found}.values())


@pytest.mark.parametrize("page", ["README.md", "docs/inference.md", "docs/latents.md"])
def test_python_examples_run(page, folder, monkeypatch):
    monkeypatch.chdir(folder)
    for registry in ("RULES", "ADAPTERS"):  # the guides add to them
        monkeypatch.setattr(adapters, registry, dict(getattr(adapters, registry)))
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    assert len(blocks) >= 2
    names: dict = {}
    for block in blocks:
        if not any(word in block for word in NEEDS_MORE):
            exec(compile(block, page, "exec"), names)


@pytest.mark.parametrize(("page", "line"), of_kind(r"^(\.venv/bin/)?vidgen "))
def test_vidgen_commands_run(page, line, folder, monkeypatch):
    monkeypatch.chdir(folder)
    arguments = shlex.split(line)[1:]
    build_parser().parse_args(arguments)
    if ABSENT.search(line):
        return
    if arguments[0] == "decode":  # what the command before it in the guide writes
        vidgen(["encode", "in.mp4", arguments[1], "--model", arguments[arguments.index("--model") + 1]])
    vidgen([*arguments, *(["--steps", "2"] if arguments[0] == "generate" else [])])


@pytest.mark.parametrize(("page", "line"), of_kind(r"^accelerate launch .*(train_vae|train_dit|encode_latents)\.py"))
def test_training_commands_are_valid(page, line, monkeypatch):
    monkeypatch.chdir(ROOT)
    arguments = shlex.split(line)
    program = next(i for i, argument in enumerate(arguments) if argument in PROGRAMS)
    load_config(PROGRAMS[arguments[program]], arguments[program + 1 :])
    if "--config_file" in arguments[:program]:
        assert Path(arguments[arguments.index("--config_file") + 1]).is_file()


class Accepted(Exception):
    pass


@pytest.mark.parametrize(("page", "line"), of_kind(r"(python|launch) .*-m benchmarks|^python -m vidgen|^python \w+/"))
def test_other_programs_accept_their_options(page, line, monkeypatch):
    """Everything up to the parsed command line is run."""
    parse = argparse.ArgumentParser.parse_args

    def parse_and_stop(*arguments, **options):
        parse(*arguments, **options)
        raise Accepted

    words = shlex.split(line)
    if "-m" in words:
        at = words.index("-m")
        run, name = runpy.run_module, words[at + 1]
    else:
        at = 0
        run, name = runpy.run_path, words[1]
    if name == "tests/check_style.py":
        assert (ROOT / name).is_file()
        return
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [name, *words[at + 2 :]])
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    with pytest.raises(Accepted):
        run(name, run_name="__main__")


def test_links_lead_somewhere():
    """Relative links and pictures of all pages exist, and so do the headings they name."""
    broken = []
    for page in [*PAGES, *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs/results").glob("*.md"))]:
        text = (ROOT / page).read_text(encoding="utf-8")
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            path, _, anchor = target.partition("#")
            if re.match(r"[a-z]+:", target):
                continue
            linked = (ROOT / page).parent / path if path else ROOT / page
            if not linked.exists() or (anchor and linked.suffix == ".md" and anchor not in anchors(linked)):
                broken.append(f"{page}: {target}")
    assert not broken, "\n".join(broken)


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
