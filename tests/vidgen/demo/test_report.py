"""The report of the demo is one self-contained page, and every value in it is escaped."""

import base64
import re
from html.parser import HTMLParser
from string import Template

import pytest

from vidgen.demo.report import TEMPLATE, write_report

VOID = {"meta", "img", "br", "link"}
NAMES = {match["named"] for match in Template.pattern.finditer(TEMPLATE.read_text()) if match["named"]} - {"facts"}
MEDIA = sorted(name for name in NAMES if name.endswith(("_png", "_mp4")))


class Page(HTMLParser):
    """Tags with attributes, texts by tag, and whether every tag that opens also closes."""

    def __init__(self, markup):
        super().__init__()
        self.tags, self.texts, self.open = [], [], []
        self.feed(markup)
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if data.strip():
            self.texts.append((self.open[-1] if self.open else "", data.strip()))

    def all(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]

    def text_of(self, tag):
        return [text for name, text in self.texts if name == tag]


@pytest.fixture
def media(tmp_path):
    """A file for every picture and video of the page, whose content is its name."""
    files = [tmp_path / ".".join(name.rsplit("_", 1)) for name in MEDIA]
    for file in files:
        file.write_bytes(file.name.encode())
    return files


@pytest.fixture
def write(media, tmp_path):
    def write(**values):
        values = {**dict.fromkeys(NAMES - set(MEDIA), "text"), **values}
        return Page(write_report(tmp_path / "out" / "report.html", values, media).read_text(encoding="utf-8"))

    return write


def test_everything_is_inside_the_page(write, media, tmp_path):
    page = write()
    sources = [attrs[name] for _, attrs in page.tags for name in ("src", "href", "poster", "srcset") if name in attrs]
    assert all(source.startswith(("data:", "#")) for source in sources)
    assert not page.all("script") and not page.all("link") and not page.all("iframe")
    style = page.text_of("style")[0]
    assert "url(" not in style and "@import" not in style
    assert "default-src 'none'" in page.all("meta")[2]["content"]
    anchors = {attrs["href"][1:] for attrs in page.all("a")}
    assert anchors == {attrs["id"] for attrs in page.all("h2")}

    embedded = [source for source in sources if source.startswith("data:")]
    contents = [base64.b64decode(source.split(",", 1)[1]).decode() for source in embedded]
    assert sorted(contents) == sorted(file.name for file in media)
    kinds = [re.match(r"data:([a-z0-9/]+);base64,", source)[1] for source in embedded]
    assert all(
        kind == {"p": "image/png", "m": "video/mp4"}[name[-3]] for kind, name in zip(kinds, contents, strict=True)
    )
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["report.html"]


def test_clips_play_silently_in_a_loop(write):
    videos = write().all("video")
    assert len(videos) == 6
    assert all({"autoplay", "loop", "muted", "playsinline"} <= video.keys() for video in videos)


def test_every_value_is_escaped(write):
    evil = "<script>alert(\"1\")</script> & 'more'"
    page = write(psnr=evil, minutes=evil, structure_shape=evil)
    assert not page.all("script")
    assert evil in page.text_of("td")
    assert any(evil in text for text in page.text_of("dd")) and any(evil in text for text in page.text_of("p"))


def test_numbers_have_four_digits_or_thousands_separators(write):
    page = write(psnr=24.0, ssim=1693.1, vae_parameters=12610560)
    assert page.text_of("td")[8:11] == ["both latents", "24.00", "1693"]
    assert any(text.startswith("Autoencoder, 12,610,560") for text in page.text_of("figcaption"))


def test_the_footer_states_the_environment(write):
    assert {"command", "git commit", "python", "torch", "device", "created"} <= set(write().text_of("dt"))


def test_missing_values_and_files_are_named(media, tmp_path):
    with pytest.raises(KeyError, match="psnr"):
        write_report(tmp_path / "report.html", {}, media)
    with pytest.raises(FileNotFoundError, match=r"none\.png"):
        write_report(tmp_path / "report.html", {}, [*media, tmp_path / "none.png"])
    assert not (tmp_path / "report.html").exists()
