"""FVD of a pipeline: distances, features that are kept and resumed, samples by number, and caveats."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, replace
from functools import partial

import diffusers
import numpy as np
import pytest
import torch
from accelerate import Accelerator

from autoencoder import AutoencoderKLVidTwin
from pipelines import VidTwinPipeline, VidTwinTransformer3DModel, default_scheduler
from pipelines.schedulers import other_solver
from vidgen.common.errors import UserError
from vidgen.data.listing import list_videos
from vidgen.data.sprites import write_sprites
from vidgen.data.video import VideoError, read_clip
from vidgen.metrics import features, frechet, fvd, real_clips
from vidgen.metrics.detectors import DETECTORS, Detector, get_detector
from vidgen.metrics.features import Collector
from vidgen.metrics.frechet import ClassScore, FeatureStatistics, bootstrap_interval, frechet_distance
from vidgen.metrics.fvd import (
    Sampling,
    class_frequencies,
    class_labels,
    evaluate_pipeline,
    generate_clips,
    list_caveats,
)
from vidgen.metrics.protocols import get_protocol, protocol_clips
from vidgen.metrics.real_clips import RealClips, draw_windows
from vidgen.metrics.reconstruction import mean_color_baseline

PROTOCOL = replace(get_protocol("sprites"), frames=4, size=32, fps=4, generated=8, real=8)
SAMPLING = Sampling(num_inference_steps=2)


class FewNumbers(Detector):
    """Few features per clip, so that few clips suffice; with classes, as I3D has."""

    name, dim, per_frame, sha256 = "few_numbers", 3, False, "0" * 64

    def __init__(self, places: tuple[int, ...] = (0, 20, 40)) -> None:
        super().__init__()
        self.places = places

    def features(self, clips):
        return get_detector("pooled_pixels")(clips)[:, list(self.places)]

    def probabilities(self, features):
        return features.softmax(dim=1)


class FewPerFrame(Detector):
    name, dim, per_frame = "few_per_frame", 3, True

    def features(self, clips):
        return clips.mean(dim=(3, 4)).transpose(1, 2).flatten(0, 1)


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _few_resamples(monkeypatch):
    monkeypatch.setattr(fvd, "bootstrap_interval", partial(bootstrap_interval, resamples=4))


@pytest.fixture(scope="module")
def sprites(tmp_path_factory):
    root = tmp_path_factory.mktemp("sprites")
    write_sprites(root, 4, seed=0, resolution=32, num_frames=8)
    return root


@pytest.fixture(scope="module")
def pipeline():
    torch.manual_seed(0)
    vae = AutoencoderKLVidTwin.from_preset("tiny-test", bottleneck="residual").eval()
    transformer = VidTwinTransformer3DModel.from_preset("tiny-test", vae=vae, num_classes=8).eval()
    for parameter in transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    names = ["bounce", "orbit", "shake", "slide", "spin", "still", "swap", "zoom"]
    pipeline = VidTwinPipeline(vae, transformer, default_scheduler(), id2label=dict(enumerate(names)))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def evaluate(pipeline, sprites, tmp_path):
    def run(**changes):
        options = {"folder": tmp_path / "kept", "samples": 8, "sampling": SAMPLING, "batch_size": 2, "shard_size": 2}
        options |= {"root": sprites, "protocol": PROTOCOL, "detectors": [FewNumbers()], **changes}
        return evaluate_pipeline(
            pipeline, options.pop("root"), options.pop("protocol"), options.pop("detectors"), Accelerator(), **options
        )

    return run


@pytest.fixture
def made(monkeypatch):
    """The numbers of the samples that are generated."""
    numbers = []
    original = fvd.generate_clips

    def watched(*arguments):
        clips = original(*arguments)

        def generate(batches):
            for batch, result in zip(batches, clips(batches), strict=True):
                numbers.extend(batch)
                yield result

        return generate

    monkeypatch.setattr(fvd, "generate_clips", watched)
    return numbers


def numbers_of(result):
    """All measurements."""
    return {name: value for name, value in asdict(result).items() if name not in ("settings", "versions")}


# --- the numbers ----------------------------------------------------------------------------------------------------


def test_every_distance_is_that_of_its_clips(evaluate, pipeline, sprites):
    [result] = evaluate(samples=16)
    files, _ = list_videos(sprites)
    real = draw_windows(files, PROTOCOL, 16)
    detector = FewNumbers()

    def read(windows):
        return torch.stack([RealClips(files, windows, PROTOCOL)[i][2] for i in range(16)])

    [batch] = generate_clips(pipeline, SAMPLING, PROTOCOL)([range(16)])
    generated, clips = batch.clips, read(real.windows)
    with torch.no_grad():
        rebuilt = protocol_clips(pipeline.vae(clips).sample.clamp(-1, 1), PROTOCOL)
    sets = {"generated": generated, "reconstructed": rebuilt, "real_vs_real": read(real.others)}
    sets["mean_color"] = protocol_clips(mean_color_baseline(clips), PROTOCOL)
    reference = FeatureStatistics.of(detector(clips))
    for name, others in sets.items():
        distance = getattr(result, name)
        expected = frechet_distance(FeatureStatistics.of(detector(others)), reference)
        assert distance.value == pytest.approx(expected, rel=1e-4), name
        assert distance.interval[0] <= distance.value <= distance.interval[1]
        assert (distance.samples, distance.real_samples) == (16, 16)
    score = ClassScore(3)
    score.update(detector.probabilities(detector(generated).double()), range(16))
    assert result.class_score == pytest.approx(score.compute(), rel=1e-6)
    assert result.infinity is not None
    json.dumps(asdict(result))


def test_several_detectors_see_the_same_clips(evaluate):
    both = evaluate(detectors=[FewNumbers(), FewPerFrame()])
    [alone] = evaluate(detectors=[FewPerFrame()])
    assert [result.detector["name"] for result in both] == ["few_numbers", "few_per_frame"]
    assert numbers_of(both[1]) == numbers_of(alone)
    assert alone.generated.samples == 8  # clips, not frames
    assert numbers_of(evaluate(detectors=[FewPerFrame(), FewNumbers()])[0]) == numbers_of(alone)


def test_batches_change_nothing_but_rounding(evaluate, tmp_path):
    [result] = evaluate()
    [other] = evaluate(folder=tmp_path / "other", batch_size=3, shard_size=5)
    for name in ("generated", "reconstructed", "real_vs_real", "mean_color"):
        ours, theirs = getattr(result, name), getattr(other, name)
        assert (ours.value, *ours.interval) == pytest.approx((theirs.value, *theirs.interval), rel=1e-3)


def test_reconstructions_are_made_at_the_autoencoders_size(evaluate, pipeline, sprites):
    small = replace(PROTOCOL, size=16)
    [result] = evaluate(protocol=small)
    files, _ = list_videos(sprites)
    windows = draw_windows(files, small, 8).windows
    full, seen = (torch.stack([RealClips(files, windows, p)[i][2] for i in range(8)]) for p in (PROTOCOL, small))
    with torch.no_grad():
        rebuilt = protocol_clips(pipeline.vae(full).sample.clamp(-1, 1), small)
    expected = frechet_distance(*(FeatureStatistics.of(FewNumbers()(clips)) for clips in (rebuilt, seen)))
    assert result.reconstructed.value == pytest.approx(expected, rel=1e-4)


def test_without_enough_videos_real_against_real_is_of_halves(evaluate):
    [result] = evaluate(samples=24)
    counts = result.real_vs_real.samples, result.real_vs_real.real_samples
    assert sum(counts) == 24 and min(counts) >= 6
    assert result.generated.samples == 24
    assert result.real_vs_real.value > 0


# --- resume and cache -----------------------------------------------------------------------------------------------


def test_an_interrupted_evaluation_resumes(evaluate, made, monkeypatch, tmp_path):
    [whole] = evaluate(folder=tmp_path / "whole")
    assert sorted(made) == list(range(8))
    made.clear()

    class Killed(Exception):
        pass

    original = features.detector_input

    def dies(clips, protocol):
        if len(made) == 6:
            raise Killed
        return original(clips, protocol)

    monkeypatch.setattr(features, "detector_input", dies)
    with pytest.raises(Killed):
        evaluate()
    assert sorted(made) == list(range(6))  # two shards were written, the third was lost
    made.clear()
    monkeypatch.setattr(features, "detector_input", original)
    [resumed] = evaluate()
    assert sorted(made) == list(range(4, 8))
    assert numbers_of(resumed) == numbers_of(whole)


def test_features_of_other_videos_depend_on_the_size_of_the_real_set(evaluate, monkeypatch, tmp_path):
    """The others of a larger set do not begin with those of a smaller one, so they share no shards."""
    [whole] = evaluate(folder=tmp_path / "whole", samples=12)
    original, others = Collector._compute_shards, []

    def dies(self, name, *arguments):
        for shard in original(self, name, *arguments):
            yield shard
            if name == "real_others":
                others.append(shard)
                if len(others) == 2:
                    raise KeyboardInterrupt

    monkeypatch.setattr(Collector, "_compute_shards", dies)
    with pytest.raises(KeyboardInterrupt):
        evaluate(samples=8)
    monkeypatch.setattr(Collector, "_compute_shards", original)
    [resumed] = evaluate(samples=12)
    assert len(others) == 2 and numbers_of(resumed) == numbers_of(whole)


def test_only_missing_and_damaged_shards_are_computed(evaluate, made, tmp_path):
    [first] = evaluate()
    made.clear()
    assert numbers_of(evaluate()[0]) == numbers_of(first) and not made
    [shards] = (tmp_path / "kept").glob("generated-*")
    (shards / "features-000002.safetensors").write_bytes(b"cut off")
    (shards / "features-000006.safetensors").unlink()
    assert numbers_of(evaluate()[0]) == numbers_of(first)
    assert sorted(made) == [2, 3, 6, 7]


def test_more_samples_reuse_the_shards_of_fewer(evaluate, made):
    evaluate(samples=5)
    made.clear()
    evaluate(samples=8)
    assert sorted(made) == [4, 5, 6, 7]


def test_other_sampling_settings_are_other_samples(evaluate, made):
    [first] = evaluate()
    for change in (
        {"seed": 1},
        {"guidance_scale": 2.0},
        {"num_inference_steps": 3},
        {"class_sampling": "prior"},
        {"guidance_interval": (0.0, 0.6)},
        {"structure_delay": 0.5},
        {"temperature": 0.5},
    ):
        made.clear()
        [second] = evaluate(sampling=replace(SAMPLING, **change))
        assert sorted(made) == list(range(8))
        assert second.generated.value != first.generated.value
        assert second.real_vs_real == first.real_vs_real
        assert second.settings.items() >= change.items()


def test_another_solver_or_cache_gives_other_samples(evaluate, pipeline, made, monkeypatch):
    [first] = evaluate()
    made.clear()
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "scheduler", other_solver(pipeline.scheduler, diffusers.UniPCMultistepScheduler))
        [second] = evaluate()
    assert sorted(made) == list(range(8))
    names = [result.settings["scheduler"]["class"] for result in (first, second)]
    assert names == ["DDIMScheduler", "UniPCMultistepScheduler"]
    for threshold in (50.0, 100.0):
        made.clear()
        pipeline.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=threshold))
        [cached] = evaluate()
        pipeline.transformer.disable_cache()
        assert sorted(made) == list(range(8)) and cached.generated.value != first.generated.value
    assert cached.settings["cache"] == {"class": "FirstBlockCacheConfig", "threshold": "100.0"}
    made.clear()
    assert numbers_of(evaluate()[0]) == numbers_of(first) and not made


@pytest.fixture
def reads(monkeypatch):
    """How many real clips are read."""
    count = []
    original = RealClips.__getitem__
    monkeypatch.setattr(RealClips, "__getitem__", lambda self, i: count.append(i) or original(self, i))
    return count


def test_statistics_of_real_clips_are_kept_until_a_setting_changes(evaluate, reads, sprites, tmp_path):
    [first] = evaluate()
    assert len(reads) == 4 * 8  # the set, its mean colors, its reconstructions, the others
    kept = sorted(path.name.split("-")[0] for path in (tmp_path / "kept").glob("*.safetensors"))
    assert kept == ["mean_color", "real", "real_others"]
    reads.clear()
    assert numbers_of(evaluate(sampling=replace(SAMPLING, seed=5))[0])["real_vs_real"] == asdict(first.real_vs_real)
    assert not reads
    for changes in (
        {"protocol": replace(PROTOCOL, pixels="truncate")},
        {"samples": 6},
        {"detectors": [type("Other", (FewNumbers,), {"sha256": "1" * 64})()]},
    ):
        evaluate(**changes)
        assert reads, changes
        reads.clear()
    video = next(sprites.rglob("*.mp4"))
    os.utime(video, (1, 1))
    evaluate()
    assert len(reads) == 4 * 8
    reads.clear()
    for path in (tmp_path / "kept").glob("real-*.safetensors"):
        path.write_bytes(path.read_bytes()[:-100])
    evaluate()
    assert len(reads) == 8


def test_another_autoencoder_invalidates_reconstructions_and_samples(evaluate, pipeline, made, reads):
    [first] = evaluate()
    made.clear()
    reads.clear()
    weight = next(pipeline.vae.decoder.parameters())
    before = weight.detach().clone()
    try:
        weight.data.add_(0.5)
        [second] = evaluate()
    finally:
        weight.data.copy_(before)
    assert len(reads) == 8 and sorted(made) == list(range(8))
    assert second.reconstructed.value != first.reconstructed.value
    assert second.real_vs_real == first.real_vs_real
    assert second.settings["vae"] != first.settings["vae"]


def test_model_configs_invalidate_features(evaluate, pipeline, made, reads):
    [first] = evaluate()
    made.clear()
    reads.clear()
    for part, setting, read in ((pipeline.vae, "qformer_dropout", 8), (pipeline.transformer, "mlp_ratio", 0)):
        before = part.config[setting]
        try:
            part.register_to_config(**{setting: 2 * before})
            [second] = evaluate()
        finally:
            part.register_to_config(**{setting: before})
        assert sorted(made) == list(range(8)) and len(reads) == read
        assert second.settings != first.settings
        made.clear()
        reads.clear()
    assert numbers_of(evaluate()[0]) == numbers_of(first) and not made and not reads


def test_a_file_with_another_source_is_not_used(evaluate, reads, tmp_path, monkeypatch):
    """Two sources with the same hash."""
    monkeypatch.setattr(features, "_hash_source", lambda source: "same")
    [first] = evaluate(protocol=replace(PROTOCOL, size=16))
    reads.clear()
    [second] = evaluate()
    assert len(reads) == 4 * 8
    assert second.generated.value != first.generated.value


# --- samples by number ----------------------------------------------------------------------------------------------


def test_a_sample_is_the_same_in_any_batch(pipeline):
    clips = generate_clips(pipeline, SAMPLING, PROTOCOL)
    [batch] = clips([[0, 1, 2, 9]])
    together = batch.clips
    assert batch.numbers == batch.keys == [0, 1, 2, 9] and together.shape == (4, 3, 4, 32, 32)
    apart = [batch.clips for batch in clips([[9, 2], [1], [0]])]
    torch.testing.assert_close(torch.cat(apart).flip(0), together, rtol=0, atol=1 / 127)  # a pixel may round over
    assert not torch.equal(together[1], together[3])  # of one class, with noise of their own


def test_class_sampling_is_balanced_uniform_or_by_frequency(pipeline, sprites):
    assert class_labels(pipeline, range(10), SAMPLING) == [0, 1, 2, 3, 4, 5, 6, 7, 0, 1]
    files, classes = list_videos(sprites)
    some = [file for file in files if classes[file.label] in ("spin", "zoom")][:6]  # 4 of spin, 2 of zoom
    frequencies = class_frequencies(pipeline, some, classes)
    assert frequencies == pytest.approx([0, 0, 0, 0, 2 / 3, 0, 0, 1 / 3])
    prior = replace(SAMPLING, class_sampling="prior")
    drawn = class_labels(pipeline, range(600), prior, frequencies)
    assert set(drawn) == {4, 7} and np.mean(np.array(drawn) == 4) == pytest.approx(2 / 3, abs=0.06)
    assert class_labels(pipeline, [37, 5], prior, frequencies) == [drawn[37], drawn[5]]
    assert class_labels(pipeline, range(600), replace(prior, seed=1), frequencies) != drawn
    with pytest.raises(UserError, match=r"is of 'walk', which the pipeline does not know; choose balanced"):
        class_frequencies(pipeline, [file._replace(label=0) for file in some], ["walk"])
    several = class_frequencies(pipeline, [some[0], *some], classes)  # a video of which two clips are drawn
    assert several == pytest.approx([0, 0, 0, 0, 5 / 7, 0, 0, 2 / 7])
    uniform = class_labels(pipeline, range(800), replace(SAMPLING, class_sampling="uniform"))
    assert uniform != class_labels(pipeline, range(800), SAMPLING) and 60 < np.bincount(uniform).min() <= 100
    with pytest.raises(UserError, match="balanced, uniform, prior, not 'equal'"):
        Sampling(class_sampling="equal")


def test_subclasses_are_drawn_within_their_class(pipeline, sprites):
    names = ["bounce", "orbit", "bounce/disc", "bounce/ring", "orbit/disc", "orbit/ring", "orbit/star", "bounce/star"]
    kinds = VidTwinPipeline(pipeline.vae, pipeline.transformer, pipeline.scheduler, id2label=dict(enumerate(names)))
    assert class_labels(kinds, range(5), SAMPLING) == [0, 1, 0, 1, 0]
    as_in_data = replace(SAMPLING, class_sampling="prior")
    assert set(class_labels(kinds, range(50), as_in_data)) == {0, 1}
    files = [file._replace(label=i) for i, file in enumerate(list_videos(sprites)[0][:2])]
    frequencies = class_frequencies(kinds, files, ["orbit/star", "bounce"])
    assert frequencies == [0.5, 0, 0, 0, 0, 0, 0.5, 0]
    assert set(class_labels(kinds, range(50), as_in_data, frequencies)) == {0, 6}


def test_prior_class_frequencies_are_those_of_the_real_clips(evaluate, sprites):
    """If any clip of a video counts, long videos count more."""
    prior, protocol = replace(SAMPLING, class_sampling="prior"), replace(PROTOCOL, windows="any", fps=None, real=8)
    [result] = evaluate(sampling=prior, protocol=protocol, samples=6)
    files, classes = list_videos(sprites)
    labels = [files[window.video].label for window in draw_windows(files, protocol, 6).windows]
    expected = np.bincount(labels, minlength=len(classes)) / 6
    assert result.settings["frequencies"] == pytest.approx(expected.tolist())
    assert max(expected) > 1 / 8  # not those of all videos


def test_an_unconditional_pipeline_is_evaluated(pipeline, sprites, tmp_path):
    vae = pipeline.vae
    plain = VidTwinPipeline(vae, VidTwinTransformer3DModel.from_preset("tiny-test", vae=vae), default_scheduler())
    plain.set_progress_bar_config(disable=True)
    [result] = evaluate_pipeline(
        plain, sprites, PROTOCOL, [FewNumbers()], Accelerator(), folder=tmp_path, samples=8, sampling=SAMPLING
    )
    assert result.generated.samples == 8


# --- statements and errors ------------------------------------------------------------------------------------------


def test_a_result_states_all_its_settings(evaluate, sprites):
    [result] = evaluate()
    said = asdict(result)
    assert said["detector"]["name"] == "few_numbers" and said["detector"]["sha256"] == "0" * 64
    assert said["protocol"]["frames"] == 4 and said["protocol"]["fps"] == 4 and said["protocol"]["split"] == "all"
    wanted = {"root", "data", "vae", "transformer", "scheduler", "seed", "guidance_scale", "num_inference_steps"}
    assert wanted | {"class_sampling", "dtype", "batch_size", "processes", "videos"} <= said["settings"].keys()
    assert {"torch", "diffusers", "git commit", "command", "device"} <= said["versions"].keys()
    for part, setting in (
        ("vae_config", "bottleneck"),
        ("transformer_config", "qk_norm"),
        ("scheduler", "beta_start"),
    ):
        assert setting in said["settings"][part]
        assert not [name for name in said["settings"][part] if name.startswith("_")]  # paths and versions
    assert result.notes == ["The detector is few_numbers, not the protocol's pooled_pixels."]


def test_caveats_state_why_a_number_is_not_comparable():
    detector = FewNumbers()
    detector.name = "i3d"

    def notes(name="tats", samples=2048, real=2048, rows=2048, classes="balanced"):
        return list_caveats(get_protocol(name), detector, samples, real, rows, classes)

    assert notes() == notes(rows=4) == []
    assert notes("latte", classes="uniform", real=13_320) == [
        "The detector is i3d, not the protocol's i3d_torchscript."
    ]
    for changes, said in (
        ({"samples": 512}, "512 generated clips, not the protocol's 2048"),
        ({"real": 500}, "500 real clips, not the protocol's 2048"),
        ({"classes": "prior"}, "Classes are prior, not the protocol's balanced"),
        ({"name": "videogpt", "samples": 256, "real": 256, "classes": "prior"}, "averages 4"),
        ({"rows": 3}, "3 feature vectors in 3 dimensions"),
    ):
        [note] = notes(**changes)
        assert said in note
    assert "does not state generated, real" in notes("vidtwin")[1]
    detector.weights, detector.sha256 = DETECTORS["i3d"].weights, DETECTORS["i3d"].weights.mirrored[0]
    assert notes() == []
    detector.sha256 = "1" * 64
    [note] = notes()
    assert "1" * 64 in note and "are not known to be VideoGPT's i3d_pretrained_400.pt" in note


def test_the_protocol_sets_the_numbers_of_clips(evaluate):
    [result] = evaluate(samples=None, protocol=replace(PROTOCOL, generated=6, real=9))
    assert (result.generated.samples, result.generated.real_samples) == (6, 9)
    [result] = evaluate(protocol=replace(PROTOCOL, generated=6, real=None))
    assert (result.generated.samples, result.generated.real_samples) == (8, 32)


def test_invalid_evaluations_are_refused(evaluate, tmp_path):
    with pytest.raises(UserError, match="compares clips of 8 frames, but the pipeline's have 4"):
        evaluate(protocol=replace(PROTOCOL, frames=8))
    with pytest.raises(UserError, match="4 clips or more: 3 samples"):
        evaluate(samples=3)
    for wrong in ({"samples": 0}, {"batch_size": 0}, {"shard_size": 0}, {"num_workers": -1}):
        [(name, value)] = wrong.items()
        with pytest.raises(UserError, match=f"^{name} must be {value + 1} or more, not {value}"):
            evaluate(**wrong)
    with pytest.raises(UserError, match="num_inference_steps must be 1 or more, not 0"):
        evaluate(sampling=replace(SAMPLING, num_inference_steps=0))
    with pytest.raises(UserError, match="structure_delay must be between 0 and 1, not 2"):
        evaluate(sampling=replace(SAMPLING, structure_delay=2.0))
    with pytest.raises(UserError, match="no dataset at"):
        evaluate(root=tmp_path / "nothing")
    with pytest.raises(UserError, match="no split files"):
        evaluate(protocol=replace(PROTOCOL, split="train"))


@pytest.mark.parametrize("pixels", ["round", "truncate", "float"])
def test_clips_that_are_not_finite_are_named_and_not_kept(evaluate, monkeypatch, tmp_path, pixels):
    original, protocol = VidTwinPipeline.__call__, replace(PROTOCOL, pixels=pixels)

    def broken(self, **options):
        output = original(self, **options)
        if options["class_labels"][0] == 4:  # of samples 4 and 5
            output.frames[1, 0, 0, 0, 0] = float("nan")
        return output

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(VidTwinPipeline, "__call__", broken)
        for _ in range(2):  # a restart meets the same
            with pytest.raises(UserError, match=r"^generated clips 5 hold NaN or infinite values"):
                evaluate(protocol=protocol)
    [kept] = (tmp_path / "kept").glob("generated-*")
    assert sorted(path.name for path in kept.iterdir()) == [
        "features-000000.safetensors",
        "features-000002.safetensors",
    ]
    monkeypatch.setattr(fvd, "reconstruct_by", lambda vae: lambda clips: clips / 0)
    with pytest.raises(UserError, match=r"^reconstructed clips 0, 1 hold NaN"):
        evaluate(protocol=protocol, folder=tmp_path / "other")


def test_features_that_are_not_finite_are_named_and_not_kept(evaluate, monkeypatch, tmp_path):
    detector = FewPerFrame()

    def features(clips):
        rows = clips.mean(dim=(3, 4)).transpose(1, 2).flatten(0, 1)
        return rows.index_fill(0, torch.tensor([7]), float("inf"))  # the last frame of the second clip

    monkeypatch.setattr(detector, "features", features)
    with pytest.raises(UserError, match=r"^few_per_frame's features of real clips 1 hold NaN or infinite"):
        evaluate(detectors=[detector])
    assert not list((tmp_path / "kept").rglob("*.safetensors"))


def test_few_videos_give_the_figures_that_are_defined(evaluate, tmp_path, monkeypatch):
    """All clips in one group, and all groups in one half."""
    videos = sorted(write_sprites(tmp_path / "videos", 1, seed=0, resolution=32, num_frames=16))
    root = tmp_path / "one"
    root.mkdir()
    (root / "only.mp4").write_bytes(videos[0].read_bytes())
    one = replace(PROTOCOL, windows="any", fps=None)
    [result] = evaluate(root=root, protocol=one, folder=tmp_path / "a")
    assert result.generated.value > 0 and result.generated.interval is None  # all real clips are of one group
    assert result.real_vs_real is None and result.infinity is None
    monkeypatch.setattr(frechet, "group_of", lambda number, groups: 2 * (number % 2))
    [result] = evaluate(samples=32, folder=tmp_path / "b")  # all groups are of the even half
    assert result.real_vs_real is None and result.generated.interval is not None
    monkeypatch.setattr(frechet, "group_of", lambda number, groups: number % 2)
    [result] = evaluate(samples=32, folder=tmp_path / "c")  # each half is one group
    assert result.real_vs_real.value > 0 and result.real_vs_real.interval is None
    json.dumps(asdict(result))


def test_clips_that_cannot_be_read_are_left_out_and_counted(evaluate, tmp_path):
    root = tmp_path / "data"
    write_sprites(root, 2, seed=0, resolution=32, num_frames=8)
    files, _ = list_videos(root)
    unread = {str(files[4].path), str(files[7].path)}

    def get(path, **where):
        if str(path) in unread:
            raise VideoError("frame 3 cannot be decoded", path)
        return read_clip(path, **where)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(real_clips, "read_clip", get)
        for protocol in (PROTOCOL, replace(PROTOCOL, real=None)):  # the second does not say how many there should be
            [result] = evaluate(root=root, batch_size=1, samples=16, protocol=protocol)
            assert result.generated.real_samples == result.reconstructed.samples == 14
            assert result.unreadable == [(path, "frame 3 cannot be decoded") for path in sorted(unread)]
            [note] = [note for note in result.notes if "missing" in note]
            assert note.startswith(f"Real clips of 2 videos are missing, the first of {min(unread)}: frame 3")
            assert result.real_vs_real.samples + result.real_vs_real.real_samples == 14
        again = evaluate(root=root, batch_size=1, samples=16, protocol=protocol)[0]
        assert numbers_of(again) == numbers_of(result)  # from what was kept
        with pytest.raises(UserError, match=r"only 0 of 8 real clips could be read.* frame 3 cannot be decoded"):
            unread |= {str(file.path) for file in files}
            evaluate(root=root, samples=8)
