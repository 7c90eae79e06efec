"""The page holds everything it shows, and shows every text as it was written."""

import base64
import re
from html.parser import HTMLParser

import pytest
from PIL import Image

from vidgen.demo.report import Report

VOID = {"meta", "img", "br", "link"}


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


def saved(report, tmp_path, **facts):
    return Page(report.save(tmp_path / "out" / "report.html", facts or None).read_text(encoding="utf-8"))


@pytest.fixture
def media(tmp_path):
    """A PNG, a GIF and bytes named .mp4."""
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png")
    Image.new("RGB", (8, 8), "blue").save(tmp_path / "b.gif")
    (tmp_path / "c.mp4").write_bytes(b"\x00\x01video")
    return tmp_path


def test_everything_is_inside_the_page(media):
    report = Report("A title", "and more").figures({"PSNR": "24.1 dB"})
    report.section("One", "Text.").image(media / "a.png", "A picture").section("Two").video(media / "b.gif")
    report.video(media / "c.mp4", "A clip")
    page = saved(report, media)

    sources = [attrs[name] for _, attrs in page.tags for name in ("src", "href", "poster", "srcset") if name in attrs]
    assert len(sources) == 5  # three media, two links to sections
    assert all(source.startswith(("data:", "#")) for source in sources)
    assert not page.all("script") and not page.all("link") and not page.all("iframe")
    style = page.text_of("style")[0]
    assert "url(" not in style and "@import" not in style
    assert "default-src 'none'" in page.all("meta")[2]["content"]
    anchors = {attrs["href"][1:] for attrs in page.all("a")}
    assert anchors == {attrs["id"] for attrs in page.all("h2")}

    embedded = [base64.b64decode(s.split(",", 1)[1]) for s in sources if s.startswith("data:")]
    assert embedded == [(media / name).read_bytes() for name in ("a.png", "b.gif", "c.mp4")]
    kinds = [re.match(r"data:([a-z0-9/]+);base64,", s)[1] for s in sources if s.startswith("data:")]
    assert kinds == ["image/png", "image/gif", "video/mp4"]
    assert [p.name for p in (media / "out").iterdir()] == ["report.html"]


def test_clips_play_silently_in_a_loop(media):
    (video,) = saved(Report("x").video(media / "c.mp4"), media).all("video")
    assert {"autoplay", "loop", "muted", "playsinline"} <= video.keys()


def test_every_text_is_escaped(media):
    evil = "<script>alert(\"1\")</script> & 'more'"
    report = Report(evil, evil).figures({evil: evil}).section(evil, evil).section("b").text(evil)
    report.table([[evil], {evil: evil}], [evil], evil).image(media / "a.png", evil).video(media / "c.mp4", evil)
    page = saved(report, media, **{evil: evil})
    assert not page.all("script")
    assert page.all("img")[0]["alt"] == evil
    for tag in ("title", "h1", "h2", "p", "dt", "dd", "code", "th", "td", "figcaption", "a"):
        assert evil in page.text_of(tag), tag


def test_tables_show_numbers_to_four_digits_and_gaps_as_dashes(tmp_path):
    rows = [["ours", 24.0, 12610560, True], {"name": "paper", "PSNR": 1693.1}]
    page = saved(Report("x").table(rows, ["name", "PSNR", "parameters", "run"]), tmp_path)
    assert page.text_of("td") == ["ours", "24.00", "12,610,560", "yes", "paper", "1693", "—", "—"]
    assert [attrs.get("class") for attrs in page.all("th")] == [None, "number", "number", None]


def test_tables_refuse_rows_that_do_not_fit():
    with pytest.raises(ValueError, match="row 2 of the table has 1 values for 2 columns"):
        Report("x").table([[1, 2], [1]], ["a", "b"])
    with pytest.raises(ValueError, match="row 1 of the table has no column for psrn"):
        Report("x").table([{"psrn": 1}], ["psnr"])


def test_figures_are_tiles_and_later_ones_replace_earlier(tmp_path):
    report = Report("x").figures({"PSNR": 20.5, "clips": 64}).figures({"PSNR": 24.25})
    page = saved(report, tmp_path, device="a chip")
    assert page.text_of("dt") == ["PSNR", "clips", "device", "made"]
    assert page.text_of("dd")[:2] == ["24.25", "64"]


def test_paragraphs_are_separated_by_blank_lines(tmp_path):
    assert saved(Report("x").text("one\nstill one\n\n\n two "), tmp_path).text_of("p") == ["one\nstill one", "two"]


def test_the_footer_says_what_made_the_page(tmp_path):
    page = saved(Report("x"), tmp_path)
    assert {"command", "git commit", "python", "torch", "device", "made"} <= set(page.text_of("dt"))


def test_files_that_cannot_be_shown_are_named(media):
    report = Report("x")
    with pytest.raises(FileNotFoundError, match=r"none\.png"):
        report.image(media / "none.png")
    with pytest.raises(ValueError, match=r"c\.mp4 cannot be shown here"):
        report.image(media / "c.mp4")
    with pytest.raises(ValueError, match=r"a\.png cannot be shown here"):
        report.video(media / "a.png")


def test_an_empty_page_is_still_a_page(tmp_path):
    page = saved(Report("Only a title"), tmp_path)
    assert page.text_of("h1") == ["Only a title"]
    assert not page.all("nav")
