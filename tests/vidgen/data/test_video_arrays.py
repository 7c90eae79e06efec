"""Videos in .npy and .npz files: layouts, lazy reading, and files that are refused."""

import numpy as np
import pytest

from vidgen.common.errors import UserError
from vidgen.data.video import VideoError, probe, read_clip
from vidgen.data.video_arrays import find_arrays, list_array_videos, recognize_layout

VIDEOS = np.random.default_rng(0).integers(0, 256, (4, 6, 8, 10, 3), dtype=np.uint8)


@pytest.mark.parametrize("layout", ["THWC", "CTHW", "TCHW"])
@pytest.mark.parametrize("kind", ["npy", "npz", "compressed", "fortran"])
def test_every_layout_and_file_gives_the_same_frames(tmp_path, layout, kind):
    array = VIDEOS.transpose(0, *(1 + "THWC".index(axis) for axis in layout))
    file = tmp_path / ("videos.npy" if kind == "npy" else "videos.npz")
    if kind == "npy":
        np.save(file, array)
    elif kind == "compressed":
        np.savez_compressed(file, videos=array)
    else:
        np.savez(file, labels=np.zeros(4), videos=np.asarray(array, order="F" if kind == "fortran" else "C"))
    lines = []
    files = list_array_videos(find_arrays(file), 8.0, lines.append)
    assert f"read as N x {' x '.join(layout)}" in lines[-1] and len(files) == 4
    info = probe(files[2].path)
    assert (info.num_frames, info.height, info.width, info.fps) == (6, 8, 10, 8.0)
    assert np.array_equal(read_clip(files[2].path, fps=8, num_frames=6), VIDEOS[2])
    assert np.array_equal(read_clip(files[1].path, start=1 / 8, fps=4, num_frames=2), VIDEOS[1, 1:5:2])
    with pytest.raises(VideoError, match="too short: frame 6 of 6"):
        read_clip(files[0].path, fps=8, num_frames=7)


def test_a_folder_of_arrays_lists_each_and_keeps_broken_ones(tmp_path):
    np.save(tmp_path / "a.npy", VIDEOS[0])
    (tmp_path / "b.npy").write_bytes(b"\x93NUMPY broken")
    files = list_array_videos(find_arrays(tmp_path))
    assert [str(file.path) for file in files] == [str(tmp_path / "a.npy"), str(tmp_path / "b.npy")]
    with pytest.raises(VideoError, match=r"b\.npy: it cannot be read as an array"):
        probe(files[1].path)
    assert find_arrays(tmp_path / "absent") is None


def test_what_is_not_videos_is_refused(tmp_path):
    for shape, message in (((5, 3, 8, 9, 3), "ambiguous"), ((5, 8, 8, 9, 4), "without an axis of 3 colors")):
        with pytest.raises(UserError, match=message):
            recognize_layout(shape, "x.npy")
    np.save(tmp_path / "floats.npy", VIDEOS.astype(np.float32))
    with pytest.raises(UserError, match=r"holds float32 of shape .*: expected videos as uint8"):
        list_array_videos([tmp_path / "floats.npy"])
    np.savez(tmp_path / "labels.npz", labels=np.zeros(3))
    with pytest.raises(UserError, match=r"labels \(float64 of shape \(3,\)\)"):
        list_array_videos([tmp_path / "labels.npz"])
    np.save(tmp_path / "objects.npy", np.array([{}]), allow_pickle=True)
    with pytest.raises(UserError, match="cannot be read as an array"):
        list_array_videos([tmp_path / "objects.npy"])
