"""Images decode, have the right size and frames, and show each clip beside its label."""

import numpy as np
import pytest
import torch
from PIL import Image

from vidgen.common.images import (
    class_grid,
    clip_strip,
    component_grid,
    describe_contrast,
    raise_contrast,
    reenactment_grid,
    save_clip_grid_video,
    to_uint8,
)

COLORS = {
    "red": (255, 0, 0),
    "green": (0, 255, 0),
    "blue": (0, 0, 255),
    "yellow": (255, 255, 0),
    "cyan": (0, 255, 255),
    "magenta": (255, 0, 255),
    "black": (0, 0, 0),
    "gray": (128, 128, 128),
}


def flat(*names, frames=5, size=16):
    """Clips (N, 3, frames, size, size) of one color each."""
    pixels = torch.tensor([COLORS[name] for name in names]).float() / 127.5 - 1
    return pixels[:, :, None, None, None].expand(-1, -1, frames, size, size).clone()


def layout(image):
    """The names of the colors of a picture's cells, row by row, as lines through it meet them."""
    pixels = np.asarray(image.convert("RGB")).astype(int)
    names, values = list(COLORS), np.array(list(COLORS.values()))
    nearest = np.abs(pixels[:, :, None] - values).sum(-1)
    found = np.where(nearest.min(-1) < 60, nearest.argmin(-1), -1)
    rows = []
    for line in found:
        cells = [names[c] for c in _runs(line, at_least=20)]
        if cells and (not rows or rows[-1] != cells):
            rows.append(cells)
    return rows


def _runs(line, at_least):
    """The colors that fill at least so many neighboring pixels of a line, left to right, joined over thin gaps."""
    edges = np.flatnonzero(np.diff(line)) + 1
    parts = [part for part in np.split(line, edges) if part[0] >= 0 and len(part) >= at_least]
    return [int(part[0]) for i, part in enumerate(parts) if i == 0 or part[0] != parts[i - 1][0]]


def test_uint8_rounds_and_clamps():
    clip = torch.tensor([-2.0, -1, -1 + 0.4 / 127.5, -1 + 0.6 / 127.5, 0.999, 1, 7])
    assert to_uint8(clip).tolist() == [0, 0, 0, 1, 255, 255, 255]


def test_every_pixel_survives_the_round_trip():
    pixels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(pixels.float() / 127.5 - 1), pixels)


def test_no_pixel_shows_nan():
    with pytest.raises(ValueError, match="NaN or infinite"):
        to_uint8(torch.tensor([0.0, float("nan")]))


# --- stills --------------------------------------------------------------------------------------------------------


def test_strip_shows_evenly_spaced_frames_enlarged_pixel_by_pixel():
    clip = flat("black", frames=9, size=8)
    for t in range(9):
        clip[0, 0, t] = t / 4 - 1  # red grows from 0 to 255
    strip = clip_strip(clip, num_frames=3)
    assert strip.size == (3 * 96 + 2 * 2, 96)
    assert [strip.getpixel((x + 48, 48))[0] for x in (0, 98, 196)] == [0, 128, 255]
    clip[0, :, 0] = -1
    clip[0, :, 0, 0, 0] = 1  # one white pixel of 8 x 8 becomes 12 x 12
    assert (np.asarray(clip_strip(clip[0], 1)) == 255).all(-1).sum() == 144


def test_strip_of_a_short_clip_has_its_frames_and_large_frames_are_reduced():
    assert clip_strip(flat("red", frames=2), num_frames=8).width == 2 * 96 + 2
    assert clip_strip(torch.zeros(3, 1, 256, 512), 1).size == (384, 192)
    assert clip_strip(torch.zeros(3, 1, 120, 160), 1).size == (160, 120)


@pytest.mark.parametrize("shape", [(2, 3, 4, 8, 8), (1, 4, 8, 8), (3, 8, 8)])
def test_strip_refuses_what_is_not_one_clip(shape):
    with pytest.raises(ValueError, match="one RGB clip"):
        clip_strip(torch.zeros(shape))


def test_images_refuse_nan():
    with pytest.raises(ValueError, match="NaN"):
        clip_strip(flat("red") * float("nan"))


def test_component_grid_has_a_row_per_clip_and_the_columns_in_order(tmp_path):
    path = component_grid(
        tmp_path / "new" / "grid.png",
        flat("red", "green"),
        flat("blue", "yellow"),
        flat("cyan", "magenta"),
        flat("black", "gray"),
    )
    image = Image.open(path)
    image.load()
    assert image.format == "PNG"
    assert layout(image) == [["red", "blue", "cyan", "black"], ["green", "yellow", "magenta", "gray"]]
    assert np.asarray(image)[:25].min() < 100  # headings
    assert [p.name for p in path.parent.iterdir()] == ["grid.png"]


def test_faint_clips_are_drawn_with_more_contrast():
    """By one whole factor around the mean color of each clip; visible clips, flat clips and NaN are unchanged."""
    faint = flat("red", "gray") + 0.02 * torch.randn(2, 3, 5, 16, 16)
    raised, factor = raise_contrast(faint)
    assert factor in (9, 10) and describe_contrast("dynamics", factor) == f"dynamics, contrast x {factor}"
    mean = faint.mean(dim=(2, 3, 4), keepdim=True)
    torch.testing.assert_close(raised - mean, factor * (faint - mean))
    for clips in (torch.randn(2, 3, 5, 16, 16), flat("red", "blue"), flat("red") * float("nan")):
        unchanged, factor = raise_contrast(clips)
        assert (factor == 1 and torch.equal(unchanged, clips)) or clips.isnan().all()
    assert describe_contrast("dynamics", 1) == "dynamics"
    assert raise_contrast(0.001 * torch.randn(1, 3, 5, 16, 16))[1] == 10


def test_component_grid_refuses_unequal_shapes(tmp_path):
    with pytest.raises(ValueError, match="dynamics only"):
        component_grid(tmp_path / "a.png", flat("red"), flat("red"), flat("red"), flat("red", frames=3))
    assert not list(tmp_path.iterdir())


def test_reenactment_grid_has_structures_down_and_dynamics_across(tmp_path):
    decoded = torch.stack([flat("black", "gray", "yellow"), flat("magenta", "black", "cyan")])
    path = reenactment_grid(tmp_path / "grid.png", flat("red", "green"), flat("blue", "cyan", "magenta"), decoded)
    assert layout(Image.open(path)) == [
        ["blue", "cyan", "magenta"],
        ["red", "black", "gray", "yellow"],
        ["green", "magenta", "black", "cyan"],
    ]
    with pytest.raises(ValueError, match=r"A, B = \(2, 3\)"):
        reenactment_grid(
            tmp_path / "b.png", flat("red", "green"), flat("blue", "cyan", "red"), decoded.transpose(0, 1)
        )


def test_class_grid_has_a_named_row_per_clip(tmp_path):
    clips = flat("red", "green", "blue")
    short, long = (class_grid(tmp_path / f"{n}.png", clips, ["a", "b", n]) for n in ("c", "a longer name"))
    assert layout(Image.open(short)) == [["red"], ["green"], ["blue"]]
    assert Image.open(long).width > Image.open(short).width
    with pytest.raises(ValueError, match="2 names for 3 clips"):
        class_grid(tmp_path / "d.png", clips, ["a", "b"])


def test_stills_are_png(tmp_path):
    with pytest.raises(ValueError, match=r"a\.jpg: an image is written as \.png"):
        class_grid(tmp_path / "a.jpg", flat("red"), ["a"])


def test_a_failed_write_leaves_the_old_image(tmp_path, monkeypatch):
    path = class_grid(tmp_path / "a.png", flat("red"), ["a"])
    before = path.read_bytes()

    def fail(self, target, **_):
        target.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        class_grid(path, flat("green"), ["a"])
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


# --- moving grids --------------------------------------------------------------------------------------------------


def changing(first, second, frames=6):
    """Clips of the first colors in the first half and of the second in the second."""
    clips = flat(*first, frames=frames)
    clips[:, :, frames // 2 :] = flat(*second, frames=frames - frames // 2)
    return clips


CLIPS = changing(["red", "green", "blue", "yellow", "cyan"], ["blue", "yellow", "red", "cyan", "green"])
FIRST = [["red", "green", "blue"], ["yellow", "cyan"]]
LAST = [["blue", "yellow", "red"], ["cyan", "green"]]


def test_gif_loops_at_its_rate_with_every_clip_in_place(tmp_path):
    clips = CLIPS + torch.linspace(-0.05, 0.05, 6)[:, None, None]  # no two frames alike: GIF would join them
    path = save_clip_grid_video(tmp_path / "a.gif", clips, fps=10, columns=3, labels=list("abcde"))
    image = Image.open(path)
    assert (image.format, image.n_frames, image.info["loop"]) == ("GIF", 6, 0)
    assert image.info["duration"] == 100
    assert layout(image) == FIRST
    image.seek(5)
    assert layout(image) == LAST
    assert list(tmp_path.iterdir()) == [path]


def test_gif_keeps_still_parts_still(tmp_path):
    noise = torch.rand(1, 3, 1, 16, 16, generator=torch.Generator().manual_seed(0)).expand(1, 3, 6, 16, 16) * 2 - 1
    path = save_clip_grid_video(tmp_path / "a.gif", torch.cat([CLIPS[:1], noise]), fps=10, columns=2)
    image, frames = Image.open(path), []
    for t in range(image.n_frames):
        image.seek(t)
        frames.append(np.asarray(image.convert("RGB")))
    right = [frame[:, frame.shape[1] // 2 + 6 :] for frame in frames]
    assert not (frames[0] == frames[-1]).all()
    assert all((part == right[0]).all() for part in right)


def test_mp4_has_every_frame_at_its_rate(tmp_path):
    av = pytest.importorskip("av")
    pytest.importorskip("vidgen.data.video")
    path = save_clip_grid_video(tmp_path / "a.mp4", CLIPS, fps=8, columns=3, labels=list("abcde"))
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, float(stream.average_rate)) == ("h264", 8.0)
        frames = [frame.to_image() for frame in container.decode(video=0)]
    assert len(frames) == 6
    assert frames[0].width % 2 == frames[0].height % 2 == 0
    assert layout(frames[0]) == FIRST
    assert layout(frames[-1]) == LAST


def test_grid_is_about_square_and_labels_make_room(tmp_path):
    plain = Image.open(save_clip_grid_video(tmp_path / "a.gif", CLIPS[:4], fps=5))
    labeled = Image.open(save_clip_grid_video(tmp_path / "b.gif", CLIPS[:4], fps=5, labels=["x" * 200] * 4))
    assert plain.width == plain.height == labeled.width < labeled.height
    assert np.asarray(plain.convert("RGB"))[3].min() == 255  # paper stays white


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"path": "a.avi"}, r"\.gif or \.mp4"),
        ({"fps": 0}, "fps > 0"),
        ({"clips": CLIPS[:0]}, r"\(N, 3, T, H, W\)"),
        ({"clips": CLIPS[0]}, r"\(N, 3, T, H, W\)"),
        ({"labels": ["a"]}, "1 labels for 5 clips"),
    ],
)
def test_moving_grids_refuse_what_they_cannot_show(tmp_path, change, message):
    arguments = {"path": "a.gif", "clips": CLIPS, "fps": 8} | change
    with pytest.raises(ValueError, match=message):
        save_clip_grid_video(tmp_path / arguments.pop("path"), **arguments)
    assert not list(tmp_path.iterdir())
