"""The latent cache: the latents of the encoder, identical for any number of processes and after interruptions."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from forked import run_forked
from safetensors.torch import load_file
from torch.utils.data import DataLoader

import encode_latents
from autoencoder import AutoencoderKLVidTwin
from vidgen.common.config import load_config
from vidgen.common.errors import UserError, run_program
from vidgen.common.loading import load_vae
from vidgen.data import latent_cache
from vidgen.data.dataset import ClipDataset
from vidgen.data.latent_cache import INDEX, LatentCache, prepare_cache
from vidgen.data.latent_encoding import compute_statistics, sum_latents
from vidgen.data.sprites import write_sprites
from vidgen.training.config import DiTTrainingConfig

ROOT = Path(__file__).parents[3]
CLIPS = 16


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def vae_folder(tmp_path_factory) -> Path:
    """A tiny autoencoder with random weights and no statistics, like a converted official one."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("vae")
    AutoencoderKLVidTwin.from_preset("tiny-test", sample_size=32, num_frames=4).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("sprites")
    write_sprites(root, 2, seed=0, resolution=32)
    return root


@pytest.fixture
def data(videos, tmp_path) -> Path:
    """A copy that a test may change."""
    shutil.copytree(videos, tmp_path / "data")
    return tmp_path / "data"


def settings(vae: Path, data: Path, folder: Path, *overrides: str) -> list[str]:
    return [
        *(f"vae={vae}", f"data.root={data}", f"latent_cache={folder}", f"output_dir={folder.parent / 'run'}"),
        *("data.fps=4", "train.mixed_precision=no", "train.dataloader_num_workers=0"),
        *("latents.shard_size=3", "latents.batch_size=2", *overrides),
    ]


@pytest.fixture
def prepare(vae_folder, videos, tmp_path):
    """Make or read a cache in this process, as training does."""

    def make(*overrides: str, vae: Path = vae_folder, data: Path = videos, name: str = "cache") -> LatentCache:
        config = load_config(DiTTrainingConfig, settings(vae, data, tmp_path / name, *overrides))
        return prepare_cache(config, load_vae(config.vae), Accelerator(cpu=True))

    return make


def run(*command: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    return subprocess.run(
        [sys.executable, *map(str, command)], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_summary_of_the_data_set_is_printed(prepare, videos, capsys):
    prepare()
    assert capsys.readouterr().out.startswith(f"{videos}: {CLIPS} videos, 8 classes (bounce, orbit, ")


# --- content ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_images_are_the_structure_of_first_frames(prepare, vae_folder, videos):
    cache, vae = prepare("latents.images=true", "latents.flips=true"), load_vae(str(vae_folder))
    clips = ClipDataset(videos, num_frames=4, fps=4, resolution=32, train=False)
    for i in range(3):
        video = clips[i]["video"][None]
        for j, clip in enumerate((video, video.flip(-1))):
            still = vae.encode(clip[:, :, :1].expand_as(clip)).latent_dist.mode()
            torch.testing.assert_close(cache[2 * i + j]["image"], vae.unpack(still).structure.flatten())
    assert "image" in prepare("latents.flips=true")[0]  # a cache with images also serves a run without
    assert "image" not in prepare(name="other")[0]
    with pytest.raises(UserError, match="made with another images"):
        prepare("latents.images=true", name="other")


def test_first_frames_are_exchanged_among_motions(prepare):
    """By (epoch, index); the image of the clip itself stays beside that which is shown. The cache is the same."""
    plain = prepare("latents.images=true")
    motions = ("latents.images=true", "data.motion_classes=[orbit, spin]")
    swapped = prepare(*motions, "latents.image_swap=1", name="other")
    assert prepare(*motions, name="other").image_swap is None
    images = torch.stack([plain[i]["image"] for i in range(len(plain))])
    members = [i for i in range(len(plain)) if plain.classes[plain[i]["label"]] in ("orbit", "spin")]
    for epoch in range(3):
        for i in range(len(plain)):
            item = swapped[epoch, i]
            other = swapped.image_swap.draw(epoch, i)
            assert torch.equal(item["image"], images[i]) and torch.equal(item["shown_image"], images[other])
            assert other in members if i in members else other == i
    assert any(swapped.image_swap.draw(epoch, i) != i for epoch in range(3) for i in members)
    with pytest.raises(UserError, match=r"data\.motion_classes: run is not among"):
        prepare("latents.image_swap=1", "data.motion_classes=[run]", name="third")


@torch.no_grad()
def test_latents_are_those_of_the_encoder_in_data_order(prepare, vae_folder, videos):
    cache, vae = prepare("latents.sample=true"), load_vae(str(vae_folder))
    clips = ClipDataset(videos, num_frames=4, fps=4, resolution=32, train=False)
    assert len(cache) == len(clips) == CLIPS
    assert cache.classes == clips.classes
    for i in range(CLIPS):
        posterior = vae.encode(clips[i]["video"][None]).latent_dist
        torch.testing.assert_close(cache[i]["mean"], posterior.mean[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(cache[i]["logvar"], posterior.logvar[0], rtol=1e-4, atol=1e-5)
        assert (cache[i]["label"], cache[i]["index"]) == (clips[i]["label"], i)
        path = Path(clips[i]["path"]).relative_to(videos)
        assert cache.describe(i) == f"{path} from {clips[i]['start']:.2f} s"
    with pytest.raises(IndexError):
        cache[CLIPS]


def test_log_variance_is_not_read_without_sampling(prepare):
    assert set(prepare()[0]) == {"mean", "label", "index"}


def test_statistics_of_all_shards_equal_those_of_all_means(prepare, vae_folder):
    cache, vae = prepare(), load_vae(str(vae_folder))
    latents = vae.unpack(torch.stack([cache[i]["mean"] for i in range(CLIPS)]))
    for at, stream in enumerate((latents.structure.double(), latents.dynamics.double())):
        assert cache.mean[at] == pytest.approx(stream.mean().item(), rel=1e-9, abs=1e-12)
        assert cache.std[at] == pytest.approx(stream.std(correction=0).item(), rel=1e-9)


def test_statistics_of_unequal_parts_and_of_an_empty_stream(vae_folder):
    vae = load_vae(str(vae_folder))
    means = 3 + torch.randn(7, vae.latent_size)
    whole = compute_statistics([sum_latents(means, vae)])
    parts = compute_statistics([sum_latents(means[:1], vae), sum_latents(means[1:], vae)])
    for a, b in zip(whole, parts, strict=True):
        assert a == pytest.approx(b, rel=1e-12)
    assert compute_statistics([[[0, 0.0, 0.0], [4, 8.0, 20.0]]]) == ([0.0, 2.0], [1.0, 1.0])


@torch.no_grad()
def test_flipped_clips_follow_their_clips(prepare, vae_folder, videos):
    cache, vae = prepare("latents.flips=true"), load_vae(str(vae_folder))
    clips = ClipDataset(videos, num_frames=4, fps=4, resolution=32, train=False)
    assert len(cache) == 2 * CLIPS
    for i in range(CLIPS):
        video = clips[i]["video"][None]
        for at, shown in enumerate((video, video.flip(-1))):
            item = cache[2 * i + at]
            torch.testing.assert_close(item["mean"], vae.encode(shown).latent_dist.mean[0], rtol=1e-4, atol=1e-5)
            assert item["label"] == clips[i]["label"]
            assert cache.describe(2 * i + at).endswith(", mirrored") == bool(at)


def test_crops_are_different_clips_of_a_video_drawn_by_seed(prepare):
    cache = prepare("latents.crops=2", "data.clips_per_video=2")
    assert len(cache) == 4 * CLIPS
    assert {cache.describe(i).split(" from ")[0] for i in range(1, 4 * CLIPS, CLIPS)} == {"bounce/bounce_0001.mp4"}
    moving = [cache[i]["mean"] for i in range(len(cache)) if cache.classes[cache[i]["label"]] != "still"]
    assert len(torch.stack(moving).unique(dim=0)) > 0.8 * len(moving)  # two random clips may have the same frames
    other = prepare("latents.crops=2", "data.clips_per_video=2", "seed=1", name="other")
    assert not torch.equal(other[0]["mean"], cache[0]["mean"])


@pytest.mark.parametrize("setting", ["data.zoom=2", "data.speed=2", "data.color=0.5", "data.background_swap=1"])
def test_augmentations_change_the_crops_and_belong_to_the_cache(prepare, setting):
    plain = prepare("latents.crops=2")
    changed = prepare("latents.crops=2", setting, name="changed")
    assert not torch.equal(changed[0]["mean"], plain[0]["mean"])
    for name, settings in (("changed", ()), ("cache", (setting,))):
        with pytest.raises(UserError, match=f"made with another {setting[5:].split('=')[0]}"):
            prepare("latents.crops=2", *settings, name=name)


def test_readable_clips_are_cached_once_and_others_listed(prepare, data):
    videos = sorted(data.rglob("*.mp4"))
    for path in videos[3:6]:  # a whole shard of them
        path.write_text("not a video")
    cache = prepare(data=data)
    assert len(cache) == CLIPS - 3
    assert len(torch.stack([cache[i]["mean"] for i in range(len(cache))]).unique(dim=0)) == CLIPS - 3
    assert [cache.describe(i).split(" from ")[0] for i in range(len(cache))] == [
        str(path.relative_to(data)) for path in videos[:3] + videos[6:]
    ]
    assert {path for path, _ in cache.bad_videos} == set(map(str, videos[3:6]))
    listed = [json.loads(line) for line in (cache.folder / "bad_videos.jsonl").read_text().splitlines()]
    assert len(listed) == 3 and all(entry["reason"] for entry in listed)


# --- reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_gives_every_clip_with_its_label_and_index(prepare, workers):
    cache = prepare("latents.sample=true")
    batches = list(DataLoader(cache, batch_size=5, shuffle=True, num_workers=workers))
    index = torch.cat([batch["index"] for batch in batches])
    assert index.sort().values.tolist() == list(range(CLIPS))
    for name in ("mean", "logvar", "label"):
        expected = torch.stack([torch.as_tensor(cache[i][name]) for i in index.tolist()])
        assert torch.equal(torch.cat([batch[name] for batch in batches]), expected)


def test_cache_is_pickled_without_its_tensors(prepare):
    cache = prepare()
    small = len(pickle.dumps(cache))
    first = cache[0]["mean"]
    assert len(pickle.dumps(cache)) == small
    assert torch.equal(pickle.loads(pickle.dumps(cache))[0]["mean"], first)


# --- reuse and rejection ---------------------------------------------------------------------------------------------


def test_cache_is_reused_and_draws_no_random_numbers(prepare, monkeypatch):
    torch.manual_seed(5)
    prepare("latents.crops=2")
    state = torch.get_rng_state()
    monkeypatch.setattr(latent_cache, "encode_clips", lambda *a, **k: pytest.fail("the clips were encoded again"))
    torch.manual_seed(5)
    prepare("latents.crops=2")
    assert torch.equal(torch.get_rng_state(), state)


def change_vae(vae: Path, tmp_path: Path) -> Path:
    other = tmp_path / "other"
    shutil.copytree(vae, other)
    weights = other / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    return other


@pytest.mark.parametrize("finished", [True, False])
def test_cache_of_another_vae_is_rejected(prepare, vae_folder, tmp_path, finished):
    folder = prepare().folder
    if not finished:
        (folder / INDEX).unlink()
    with pytest.raises(UserError, match="made with another vae") as caught:
        prepare(vae=change_vae(vae_folder, tmp_path))
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("data.fps=8", "fps"),
        ("latents.crops=2", "crops"),
        ("latents.flips=true", "flips"),
        ("data.clips_per_video=2", "clips_per_video"),
    ],
)
def test_cache_of_other_clips_is_rejected(prepare, override, key):
    prepare()
    with pytest.raises(UserError, match=f"made with another {key} "):
        prepare(override)


def test_seed_matters_only_for_random_crops(prepare):
    prepare()
    prepare("seed=1")
    prepare("latents.crops=2", name="drawn")
    with pytest.raises(UserError, match="made with another seed"):
        prepare("latents.crops=2", "seed=1", name="drawn")


@pytest.mark.parametrize("change", ["rename", "rewrite", "remove", "class"])
def test_cache_of_other_videos_is_rejected(prepare, data, change):
    prepare(data=data)
    video = sorted(data.rglob("*.mp4"))[0]
    if change == "rename":
        video.rename(video.with_name("renamed.mp4"))
    elif change == "rewrite":
        os.utime(video, (1, 1))
    elif change == "remove":
        video.unlink()
    else:
        video.parent.rename(video.parent.with_name("zzz"))
    with pytest.raises(UserError, match="made with another data"):
        prepare(data=data)


def test_cache_of_other_classes_is_rejected(prepare, data):
    table = data / "table.csv"
    paths = [path.relative_to(data) for path in sorted(data.rglob("*.mp4"))]
    table.write_text("path,label\n" + "".join(f"{path},{path.parent.name}\n" for path in paths))
    cache = prepare(data=table)
    assert len(cache.classes) == 8 and cache.describe(0).startswith("bounce/bounce_0000.mp4 ")
    table.write_text(table.read_text().replace(",orbit", ",circle"))
    with pytest.raises(UserError, match="made with another data"):
        prepare(data=table)


def test_moved_data_set_keeps_its_cache(prepare, data):
    prepare(data=data)
    moved = data.with_name("moved")
    data.rename(moved)
    prepare(data=moved)


@pytest.mark.parametrize("damage", ["cut", "remove", "index"])
def test_damaged_cache_is_reported(prepare, damage):
    folder = prepare().folder
    shard = sorted(folder.glob("*.safetensors"))[1]
    if damage == "cut":
        shard.write_bytes(shard.read_bytes()[:-4])
    elif damage == "remove":
        shard.unlink()
    else:
        (folder / INDEX).write_text('{"source"')
    with pytest.raises(UserError, match=r"cannot be read .*delete the folder"):
        prepare()


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("latents.crops=0", "latents.crops must be 1 or more"),
        ("latents.shard_size=0", "latents.shard_size must be 1 or more"),
        ("data.resolution=64", "data.resolution is 64, but the latents of .* are those of 32"),
        ("data.num_frames=8", "data.num_frames is 8"),
        ("data.zoom=1.5", r"data.zoom .* set latents.crops above 1"),
    ],
)
def test_invalid_setting_raises_one_sentence(prepare, override, sentence):
    with pytest.raises(UserError, match=sentence):
        prepare(override)


# --- processes and interruptions -------------------------------------------------------------------------------------


def test_two_processes_write_the_cache_of_one(prepare, vae_folder, data, tmp_path, monkeypatch, capfd):
    """Shards, index and the list of bad videos are bit-identical, with some broken mp4 files."""
    for path in sorted(data.rglob("*.mp4"))[4:6]:
        path.write_text("not a video")
    one = prepare("latents.flips=true", data=data).folder
    capfd.readouterr()
    monkeypatch.setattr(
        sys, "argv", ["encode_latents.py", *settings(vae_folder, data, tmp_path / "two", "latents.flips=true")]
    )
    run_forked(run_program, encode_latents.main, processes=2)
    output = capfd.readouterr()
    assert output.out.count("28 clips in 8 classes; 2 videos skipped") == 1
    assert contents(tmp_path / "two") == contents(one)
    assert "6/6" in output.err, "the first process should encode 3 of the 6 shards: 6 of 11 batches"


KILLED_WHILE_IT_WRITES = """
import os, signal, sys
import encode_latents
from vidgen.data import latent_cache
save, written = latent_cache.save_file, []
def save_file(tensors, path, metadata):
    save(tensors, path, metadata)
    written.append(path)
    if len(written) == 3:
        os.truncate(path, 100)
        os.kill(os.getpid(), signal.SIGKILL)
latent_cache.save_file = save_file
encode_latents.main()
"""


def test_killed_run_resumes_with_identical_result(prepare, vae_folder, videos, tmp_path, monkeypatch):
    whole = prepare(name="whole").folder
    killed = run("-c", KILLED_WHILE_IT_WRITES, *settings(vae_folder, videos, tmp_path / "cache"))
    assert killed.returncode == -signal.SIGKILL
    folder = tmp_path / "cache"
    shards = sorted(folder.glob("latents-*.safetensors"))
    assert len(shards) == 2 and not (folder / INDEX).exists()
    assert list(folder.glob(".latents-*")), "it should be killed in the middle of a file"
    before = [path.stat().st_mtime_ns for path in shards]
    prepare()
    assert [path.stat().st_mtime_ns for path in shards] == before, "a finished shard was encoded again"
    assert contents(folder) == contents(whole)


def test_damaged_shards_and_those_of_another_size_are_encoded_again(prepare):
    whole = prepare(name="whole").folder
    folder = prepare("latents.shard_size=5").folder
    (folder / INDEX).unlink()
    shutil.copy(sorted(whole.glob("*.safetensors"))[0], folder)
    shutil.copy(sorted(whole.glob("*.safetensors"))[1], folder)
    (folder / sorted(whole.glob("*.safetensors"))[0].name).write_bytes(b"damaged")
    prepare()
    assert contents(folder) == contents(whole)
    assert sum(len(load_file(path)["mean"]) for path in folder.glob("*.safetensors")) == CLIPS


def test_user_error_in_the_program_is_one_sentence(vae_folder, tmp_path, monkeypatch):
    arguments = settings(vae_folder, Path("absent"), tmp_path / "cache")
    monkeypatch.setattr(sys, "argv", ["encode_latents", *arguments, "train.mixed_precision=int3"])
    with pytest.raises(UserError, match=r"train\.mixed_precision must be one of"):
        encode_latents.main()
    monkeypatch.setattr(sys, "argv", ["encode_latents", *arguments])
    with pytest.raises(UserError, match="no dataset at absent"):
        encode_latents.main()


# --- settings that latents do not depend on --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("data.flip=true", r"data\.flip flips clips while a VAE is trained.*set latents\.flips=true"),
        ("data.resolution=64", r"data\.resolution is 64, but the latents of"),
    ],
)
def test_setting_without_effect_is_rejected(prepare, override, sentence):
    with pytest.raises(UserError, match=sentence):
        prepare(override)


def test_a_number_of_held_out_videos_without_effect_gives_a_warning(prepare, videos, capsys):
    cache = prepare(f"data.validation_root={videos}", "data.num_validation_videos=3")
    assert "warning: data.num_validation_videos has no effect here" in capsys.readouterr().out
    assert len(cache) == CLIPS
    prepare("data.num_validation_videos=0")
    assert "warning" not in capsys.readouterr().out


def test_non_finite_latents_are_not_cached(vae_folder, prepare, tmp_path):
    vae = AutoencoderKLVidTwin.from_pretrained(vae_folder)
    torch.nn.init.constant_(next(vae.encoder.parameters()), torch.inf)
    vae.save_pretrained(tmp_path / "broken")
    with pytest.raises(UserError, match=r"^The autoencoder produced NaN .* in float32.*(orbit|bounce).*\.mp4"):
        prepare(vae=tmp_path / "broken")
    assert not list((tmp_path / "cache").glob("*.safetensors"))
