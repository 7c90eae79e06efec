"""Pictures of the bundled model of real video, which need its weights but no training."""

from __future__ import annotations

from PIL import Image

from vidgen.data.video import probe
from vidgen.demo.bundled import CLIPS, decompose_real_video


def test_held_out_clips_are_decoded_from_each_latent_and_swapped(tmp_path):
    picture = decompose_real_video(tmp_path)
    clips = len(list(CLIPS.glob("*.mp4")))
    assert clips == 3 and sorted(p.name for p in tmp_path.iterdir()) == ["real.mp4", "real.png", "real_swaps.png"]
    moving, still, swaps = probe(tmp_path / "real.mp4"), Image.open(picture), Image.open(tmp_path / "real_swaps.png")
    assert moving.num_frames == 16 and moving.width > 3 * 2 * 96 and moving.height > 4 * 2 * 64
    assert still.width > 4 * 4 * 2 * 96 and still.height > 3 * 2 * 64
    assert swaps.width > 4 * 3 * 2 * 96 and swaps.height > 4 * 2 * 64
