"""Both trainings end to end: files of a run, learning, resuming, errors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from accelerate.utils import DistributedType
from safetensors.torch import load_file

from autoencoder import AutoencoderKLVidTwin
from pipelines import VidTwinPipeline
from runs import FULL, WEIGHTS, assert_same_tensors, logged, losses, numbers
from vidgen.common.errors import UserError
from vidgen.common.loading import load_vae
from vidgen.data.dataset import ClipDataset
from vidgen.data.latent_cache import LatentCache
from vidgen.data.listing import list_videos
from vidgen.data.splits import split_validation
from vidgen.data.sprites import MOTIONS
from vidgen.losses.diffusion import DiffusionLoss
from vidgen.training import trainer
from vidgen.training.checkpoints import list_checkpoints
from vidgen.training.dit_trainer import train_dit
from vidgen.training.failures import TrainingDiverged
from vidgen.training.vae_trainer import VAETrainer, train_vae


def test_a_vae_run_writes_its_files(trained_vae):
    run = trained_vae.parent
    assert list(losses(run)) == [1, 2, 3, 4, 5, 6]
    validation = logged(run)[-1]
    assert {"validation/psnr", "validation/ssim", "validation/psnr_mean_color", "validation/psnr_downsample"} < set(
        validation
    )
    assert (run / "validation" / "step-6.png").stat().st_size > 1000
    assert [path.name for path in list_checkpoints(run)] == ["checkpoint-6"]
    assert "command" in (run / "environment.yaml").read_text()
    model = AutoencoderKLVidTwin.from_pretrained(trained_vae)
    assert len(model.config.latents_mean) == len(model.config.latents_std) == 2
    assert not list(run.glob(".*")), "something half-written was left"


def test_statistics_are_those_of_the_training_set(trained_vae, sprites):
    files, classes = list_videos(sprites)
    assert_statistics(trained_vae, split_validation(files, 2, 0)[0], classes)


@torch.no_grad()
def assert_statistics(vae: Path, files: list, classes: list[str]) -> None:
    """The VAE's config has the statistics of the latents of one clip of each video."""
    model = AutoencoderKLVidTwin.from_pretrained(vae)
    clips = ClipDataset(files, 4, 4, 32, train=False, classes=classes)
    latents = model.unpack(
        torch.cat([model.encode(clips[i]["video"][None]).latent_dist.mode() for i in range(len(files))])
    )
    for at, stream in enumerate((latents.structure, latents.dynamics)):
        assert stream.mean().item() == pytest.approx(model.config.latents_mean[at], rel=1e-3, abs=1e-4)
        assert stream.std().item() == pytest.approx(model.config.latents_std[at], rel=1e-2)


def test_the_vae_learns(vae_config, tmp_path):
    train_vae(vae_config(tmp_path, "train.max_train_steps=40", "optim.learning_rate=3e-3"))
    values = losses(tmp_path)
    assert sum(values[s] for s in range(36, 41)) < 0.75 * sum(values[s] for s in range(1, 6))


def test_logging_and_validation_do_not_change_a_run(vae_config, tmp_path):
    """Logging, validating and saving, whenever; and what is left is the average, with both players trained."""
    settings = ["train.max_train_steps=6", "train.ema_decay=0.9", *FULL]
    watched = ["train.validation_steps=2", "train.checkpointing_steps=3"]
    train_vae(vae_config(tmp_path / "seldom", "train.logging_steps=3", *settings))
    train_vae(vae_config(tmp_path / "often", "train.logging_steps=1", *watched, *settings))
    assert_same_tensors(tmp_path / "seldom" / "checkpoint-6", tmp_path / "often" / "checkpoint-6")
    often, seldom = losses(tmp_path / "often"), losses(tmp_path / "seldom")
    assert seldom == pytest.approx({last: sum(often[last - i] for i in range(3)) / 3 for last in (3, 6)})
    assert numbers(tmp_path / "often")[6]["lecam"] > 0

    final, checkpoint = load_file(tmp_path / "often" / "final" / WEIGHTS), tmp_path / "often" / "checkpoint-6"
    average, last = load_file(checkpoint / "ema.safetensors"), load_file(checkpoint / "model.safetensors")
    assert all(torch.equal(final[name], tensor) for name, tensor in average.items())
    assert any(not torch.equal(last[f"vae.{name}"], tensor) for name, tensor in average.items())
    optimizer = torch.load(checkpoint / "optimizer.bin", weights_only=True)
    steps = [{optimizer["state"][i]["step"].item() for i in group["params"]} for group in optimizer["param_groups"]]
    assert steps == [{6}, {4}], "the discriminator starts after two steps"


def test_gradients_are_clipped_to_the_maximum_norm(vae_config, tmp_path):
    """So far under Adam's epsilon that nothing moves."""
    settings = ["train.max_train_steps=3", "optim.adam_weight_decay=0", "train.ema_decay=0", *FULL]
    train_vae(vae_config(tmp_path, "train.checkpointing_steps=1", "train.max_grad_norm=1e-14", *settings))
    first, last = (load_file(tmp_path / f"checkpoint-{step}" / "model.safetensors") for step in (1, 3))
    assert all((last[name] - first[name]).abs().max() < 1e-7 for name in first if "lecam" not in name)
    assert all(numbers(tmp_path)[3][name] > 1e-3 for name in ("grad_norm", "grad_norm/discriminator"))


def test_a_maximum_norm_of_zero_disables_clipping(vae_config, tmp_path):
    for norm in (0, 1e9):
        train_vae(vae_config(tmp_path / str(norm), "train.max_train_steps=3", f"train.max_grad_norm={norm}"))
    assert losses(tmp_path / "0") == losses(tmp_path / "1000000000.0")
    assert losses(tmp_path / "0")[3] < losses(tmp_path / "0")[1]


def test_dropout_differs_in_every_micro_batch(vae_config, tmp_path, monkeypatch):
    seeds = []
    compute = VAETrainer.compute_losses
    monkeypatch.setattr(
        VAETrainer, "compute_losses", lambda *args: (seeds.append(torch.initial_seed()), compute(*args))[1]
    )
    train_vae(vae_config(tmp_path, "train.max_train_steps=2", "train.gradient_accumulation_steps=2"))
    assert len(set(seeds)) == 4


def test_gradient_checkpointing_trains_the_same(vae_config, tmp_path, monkeypatch):
    asked = []
    enable = AutoencoderKLVidTwin.enable_gradient_checkpointing
    monkeypatch.setattr(
        AutoencoderKLVidTwin, "enable_gradient_checkpointing", lambda self: (asked.append(0), enable(self))[1]
    )
    for name in ("false", "true"):
        train_vae(vae_config(tmp_path / name, "train.max_train_steps=2", f"train.gradient_checkpointing={name}"))
    assert asked == [0]
    assert losses(tmp_path / "true") == pytest.approx(losses(tmp_path / "false"), rel=1e-5)


def test_checkpoints_are_kept_to_their_limit(vae_config, tmp_path):
    train_vae(
        vae_config(
            tmp_path, "train.max_train_steps=4", "train.checkpointing_steps=1", "train.checkpoints_total_limit=2"
        )
    )
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-3", "checkpoint-4"]


def test_broken_videos_are_skipped_counted_and_listed(vae_config, sprites, tmp_path, capsys):
    data = tmp_path / "data"
    shutil.copytree(sprites, data)
    (data / "orbit" / "broken.mp4").write_text("not a video")
    (data / "slide" / "empty.mp4").write_bytes(b"")
    (tmp_path / "held-out").mkdir()
    for motion in ("orbit", "slide"):
        shutil.copy(next((sprites / motion).glob("*.mp4")), tmp_path / "held-out" / f"{motion}.mp4")
    (tmp_path / "held-out" / "cut.mp4").write_bytes(b"0")
    settings = ["train.max_train_steps=6", f"data.validation_root={tmp_path / 'held-out'}"]
    train_vae(vae_config(tmp_path / "run", f"data.root={data}", *settings))
    listed = [json.loads(line) for line in (tmp_path / "run" / "bad_videos.jsonl").read_text().splitlines()]
    assert {Path(entry["path"]).name for entry in listed} == {"broken.mp4", "empty.mp4", "cut.mp4"}
    assert all(entry["reason"] for entry in listed)
    assert "3 videos skipped" in capsys.readouterr().out
    assert_statistics(tmp_path / "run" / "final", *list_videos(sprites))  # without the clips that replaced them

    (tmp_path / "held-out" / "cut.mp4").unlink()  # the clip that replaced it was not counted twice
    train_vae(vae_config(tmp_path / "sound", f"data.root={data}", *settings))
    assert numbers(tmp_path / "sound")[6] == numbers(tmp_path / "run")[6]


def test_a_dit_run_leaves_a_pipeline_and_resumes(dit_config, trained_vae, tmp_path):
    settings = ["train.checkpointing_steps=2", "optim.lr_scheduler=constant_with_warmup"]
    settings += ["diffusion.self_alignment=0.5", "train.gradient_checkpointing=true"]
    whole = train_dit(dit_config(tmp_path / "whole", "train.max_train_steps=6", *settings))
    train_dit(dit_config(tmp_path / "cut", "train.max_train_steps=4", *settings))
    cut = dit_config(tmp_path / "cut", "train.max_train_steps=6", "resume=latest", *settings)
    resumed = train_dit(cut)
    assert losses(tmp_path / "whole") == losses(tmp_path / "cut")
    a, b = (load_file(folder / "transformer" / WEIGHTS) for folder in (whole, resumed))
    assert all(torch.equal(a[key], b[key]) for key in a)

    pipeline = VidTwinPipeline.from_pretrained(whole)
    assert list(pipeline.labels) == sorted(["slide", "bounce", "orbit", "spin", "zoom", "shake", "swap", "still"])
    frames = pipeline(class_labels="orbit", num_inference_steps=2, output_type="np").frames
    assert frames.shape == (1, 4, 32, 32, 3)
    saved, ours = (AutoencoderKLVidTwin.from_pretrained(folder) for folder in (whole / "vae", trained_vae))
    assert saved.config.latents_std == ours.config.latents_std
    assert (tmp_path / "whole" / "samples" / "step-6.gif").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["diffusion.self_alignment=0.5", "diffusion.self_alignment_layers=[1,3]"], "between 1 and 2, the number of"),
        (["model.preset=tyni"], "Unknown DiT preset 'tyni'"),
    ],
)
def test_a_dit_that_does_not_fit_is_refused_before_the_latents_are_encoded(dit_config, tmp_path, settings, message):
    with pytest.raises(UserError, match=message):
        train_dit(dit_config(tmp_path, "vae=missing", *settings))


@pytest.fixture
def learned(monkeypatch) -> list[torch.Tensor]:
    """The classes that a DiT is trained on, step by step."""
    classes = []
    drop = DiffusionLoss._drop_labels
    monkeypatch.setattr(DiffusionLoss, "_drop_labels", lambda *args: classes.append(drop(*args)) or classes[-1])
    return classes


def test_a_dit_learns_subclasses_and_superclasses(dit_config, sprites, tmp_path, learned):
    table = [f"data.root={sprites / 'shapes.csv'}", "diffusion.class_dropout=0", "train.max_train_steps=4"]
    final = train_dit(dit_config(tmp_path / "above", *table, "diffusion.subclass_dropout=1"))
    pipeline = VidTwinPipeline.from_pretrained(final)
    _, kinds = list_videos(sprites / "shapes.csv")
    assert pipeline.labels == {name: label for label, name in enumerate(sorted(MOTIONS))}
    assert pipeline.subclasses == {name: label for label, name in enumerate(kinds, start=8)}
    above = torch.cat(learned)  # every clip once
    assert above.sort().values.tolist() == [label for label in range(8) for _ in range(2)]
    learned.clear()
    train_dit(dit_config(tmp_path / "below", *table, "diffusion.subclass_dropout=1e-9"))
    names = [kinds[label - 8] for label in torch.cat(learned).tolist()]
    assert [name.split("/")[0] for name in names] == [sorted(MOTIONS)[label] for label in above.tolist()]
    with pytest.raises(UserError, match=r"needs classes with subclasses, such as jump/dog of jump: .* bounce, orbit"):
        train_dit(dit_config(tmp_path / "none", "diffusion.subclass_dropout=0.1"))


def test_clips_without_a_class_get_the_null_class(dit_config, sprites, tmp_path, learned):
    head, first, *rows = (sprites / "shapes.csv").read_text().splitlines()
    rows = [head, *(f"{sprites}/{row}" for row in [first.split(",")[0] + ",", *rows])]
    (tmp_path / "some.csv").write_text("\n".join(rows))
    settings = [f"data.root={tmp_path / 'some.csv'}", "diffusion.class_dropout=0", "train.max_train_steps=4"]
    final = train_dit(dit_config(tmp_path / "run", *settings, "diffusion.subclass_dropout=0.5"))
    pipeline = VidTwinPipeline.from_pretrained(final)
    assert torch.cat(learned).eq(pipeline.transformer.config.num_classes).sum() == 1


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (["data.root=absent"], "no dataset at absent"),
        (["model.preset=huge"], "Unknown VidTwin preset 'huge'"),
        (["model.overrides={hiden_size: 3}"], "hiden_size"),
        (["data.resolution=33"], "multiple of patch_size"),
        (["resume=absent"], "No checkpoint at absent"),
        (["train.mixed_precision=int3"], "train.mixed_precision"),
        (["output_dir=README.md"], "output_dir: the folder README.md cannot be created (File exists)"),
        (["train.report_to=nonsense"], "train.report_to does not fit"),
        (["train.report_to=clearml"], "clearml is not installed"),
        (["optim.lr_scheduler=square"], "optim.lr_scheduler"),
        (["optim.lr_scheduler=piecewise_constant"], "needs rules"),
        (["optim.learning_rate=-1"], "optim.learning_rate must be 0 or more, not -1"),
    ],
)
def test_vae_mistakes_get_one_sentence(vae_config, tmp_path, settings, sentence):
    with pytest.raises(UserError) as caught:
        train_vae(vae_config(tmp_path, *settings))
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("optim.lr_scheduler=square", "optim.lr_scheduler"),
        ("optim.name=muom", "optim.name must be one of adamw, muon"),
        ("optim.name=torch.optim.Adammm", "has no optimizer class 'Adammm'"),
        ("data.motion_classes=[dance]", "data.motion_classes: dance is not among the classes"),
    ],
)
def test_dit_mistakes_are_found_before_the_clips_are_encoded(dit_config, tmp_path, setting, sentence):
    with pytest.raises(UserError) as caught:
        train_dit(dit_config(tmp_path, "train.max_train_steps=1", "latents.crops=2", setting))
    assert sentence in str(caught.value) and not list(tmp_path.rglob("latents-*"))


def test_a_damaged_checkpoint_is_named(vae_config, tmp_path):
    train_vae(vae_config(tmp_path, "train.max_train_steps=1"))
    weights = tmp_path / "checkpoint-1" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(UserError, match="checkpoint-1 does not fit this run"):
        train_vae(vae_config(tmp_path, "train.max_train_steps=2", "resume=latest"))


@pytest.mark.parametrize("prediction_type", ["sample", "epsilon", "v_prediction", "flow_prediction"])
def test_every_target_trains_and_its_pipeline_samples(dit_config, tmp_path, prediction_type):
    settings = ["train.max_train_steps=2", f"diffusion.prediction_type={prediction_type}", "latents.sample=true"]
    settings += ["diffusion.loss_weighting=min_snr", "diffusion.independent_timesteps=0.5"]
    settings += ["diffusion.timestep_sampling=logit_normal", "model.overrides={self_conditioning: true}"]
    final = train_dit(dit_config(tmp_path, *settings))
    assert all({"loss", "structure", "dynamics"} < set(entry) for entry in logged(tmp_path) if "loss" in entry)
    pipeline = VidTwinPipeline.from_pretrained(final)
    stated = pipeline.scheduler.config.get("prediction_type", "flow_prediction")
    assert stated == prediction_type
    frames = pipeline(class_labels="orbit", num_inference_steps=2, output_type="pt").frames
    assert frames.isfinite().all() and frames.shape == (1, 4, 3, 32, 32)


def test_a_dit_is_trained_on_first_frames(dit_config, tmp_path, monkeypatch):
    """The images are normalized like the structure of the clips, and the trained pipeline animates one."""
    seen, forward = [], DiffusionLoss.forward

    def spy(self, latents, labels, noise, uniform, image, text, shown_image):
        seen.append((latents, image, shown_image))
        return forward(self, latents, labels, noise, uniform, image, text, shown_image)

    monkeypatch.setattr(DiffusionLoss, "forward", spy)
    settings = ["train.max_train_steps=4", "model.overrides={image_conditioning: true}", "diffusion.image_dropout=0"]
    with pytest.raises(UserError, match=r"set latents\.images=true"):
        train_dit(dit_config(tmp_path, *settings))
    assert not (tmp_path / "latents").exists(), "refused before the latents are encoded"
    final = train_dit(dit_config(tmp_path, *settings, "latents.images=true"))
    latents, image, shown_image = seen[0]
    assert shown_image is None
    cache = LatentCache.load(tmp_path / "latents", {})
    vae = load_vae(str(final))
    raw, stored = (torch.stack([cache[i][name] for i in range(len(cache))]) for name in ("image", "mean"))
    expected = (raw - vae.latents_mean[0]) / vae.latents_std[0]
    distances = torch.cdist(image, expected)
    assert distances.amin(dim=1).max() < 1e-3 and image.shape[1] < latents.shape[1] == stored.shape[1]
    pipeline = VidTwinPipeline.from_pretrained(final)
    free, animated = (
        pipeline(
            "orbit", image=picture, num_inference_steps=2, output_type="pt", generator=torch.manual_seed(0)
        ).frames
        for picture in (None, torch.rand(1, 3, 32, 32))
    )
    assert animated.shape == (1, 4, 3, 32, 32) and not torch.equal(free, animated)

    # In stages: as parent and child they have the same weights at first, and other targets.
    staged = ["model.preset=null", f"model.pretrained={final}", "latents.images=true", "latents.image_swap=0.9"]
    with pytest.raises(UserError, match=r"latents\.image_swap .* set model\.overrides\.image_residual above 0"):
        train_dit(dit_config(tmp_path / "staged", *settings[:1], *staged))
    config = dit_config(tmp_path / "staged", *settings[:1], *staged, "model.overrides={image_residual: 0.5}")
    child = VidTwinPipeline.from_pretrained(train_dit(config))
    _, image, shown_image = seen[-1]
    assert torch.cdist(shown_image, expected).amin(dim=1).max() < 1e-3 and not torch.equal(image, shown_image)
    assert child.transformer.config.image_residual and not pipeline.transformer.config.image_residual
    assert child("orbit", num_inference_steps=2, output_type="pt").frames.isfinite().all()


def test_latents_are_their_mean_or_drawn_around_it(dit_config, tmp_path, monkeypatch):
    seen = []

    def spy(self, latents, labels, noise, *others):
        seen.append((latents, noise))
        return forward(self, latents, labels, noise, *others)

    forward = DiffusionLoss.forward
    monkeypatch.setattr(DiffusionLoss, "forward", spy)
    shared = ["train.max_train_steps=1", f"latent_cache={tmp_path / 'cache'}", "train.train_batch_size=16"]
    for sample in ("false", "true"):
        train_dit(dit_config(tmp_path / sample, f"latents.sample={sample}", *shared))
    (means, _), (drawn, noise) = seen
    assert noise.shape == means.shape == drawn.shape
    around = drawn - means
    assert around.std() > 0.01
    assert torch.corrcoef(torch.stack([around.flatten(), noise.flatten()]))[0, 1].abs() < 0.1


def test_a_run_with_cached_latents_equals_one_that_encodes_them(dit_config, tmp_path):
    """So a run killed before its first checkpoint, started again, is still the same run."""
    shared = f"latent_cache={tmp_path / 'cache'}"
    for run in ("makes", "finds"):
        train_dit(dit_config(tmp_path / run, "train.max_train_steps=3", shared))
    assert losses(tmp_path / "makes") == losses(tmp_path / "finds")


def test_unreadable_videos_are_listed_in_the_run_also_from_a_found_cache(dit_config, sprites, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(sprites, data)
    (data / "orbit" / "broken.mp4").write_text("not a video")
    settings = ["train.max_train_steps=1", f"data.root={data}", f"latent_cache={tmp_path / 'cache'}"]
    for run in ("makes", "finds"):
        train_dit(dit_config(tmp_path / run, *settings))
        assert "broken.mp4" in (tmp_path / run / "bad_videos.jsonl").read_text()


def test_a_diverged_dit_run_names_its_clips(dit_config, tmp_path):
    with pytest.raises(TrainingDiverged, match=r" on .*\.mp4 from \d"):
        train_dit(dit_config(tmp_path, "train.max_train_steps=50", "optim.learning_rate=1e30"))


def test_statistics_come_from_the_cache_where_the_vae_has_none(dit_config, trained_vae, tmp_path):
    bare = AutoencoderKLVidTwin.from_pretrained(trained_vae)
    bare.register_to_config(latents_mean=None, latents_std=None)
    bare.save_pretrained(tmp_path / "vae")
    final = train_dit(dit_config(tmp_path / "run", "train.max_train_steps=1", f"vae={tmp_path / 'vae'}"))
    index = json.loads((tmp_path / "run" / "latents" / "index.json").read_text())
    config = AutoencoderKLVidTwin.from_pretrained(final / "vae").config
    assert (config.latents_mean, config.latents_std) == (index["mean"], index["std"])


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (["vae=absent"], "No VAE in absent"),
        (["model.preset=huge"], "Unknown DiT preset 'huge'"),
        (["model.overrides={dynamics_patch_size: [3, 1]}"], "cannot be built"),
        (["model.overrides={num_layer: 2}"], "unexpected keyword argument 'num_layer'"),
        (["model.overrides={caption_channels: 8}"], "is trained on captions: set text.encoder"),
        (["train.freeze=[blocks]"], "no module 'blocks'; its modules are structure_embed, "),
        (["text.encoder=small"], "has a caption: add a column caption to the CSV"),
        (["diffusion.prediction_type=guess"], "guess"),
        (["model.latent_setting=2"], r"model.latent_setting is a setting of the VAE"),
        (["diffusion.noise_schedule=sigmoid"], "noise_schedule must be one of"),
        (["diffusion.prediction_type=epsilon", "diffusion.zero_terminal_snr=true"], "cannot have zero terminal SNR"),
        (["diffusion.prediction_type=flow_prediction", "diffusion.noise_schedule=linear"], "has a fixed schedule"),
        (["diffusion.prediction_type=flow_prediction", "diffusion.zero_terminal_snr=false"], "ends in pure noise"),
        (["diffusion.loss_weighting=guess"], "diffusion.loss_weighting must be one of"),
    ],
)
def test_dit_mistakes_get_one_sentence(dit_config, tmp_path, settings, sentence):
    with pytest.raises(UserError) as caught:
        train_dit(dit_config(tmp_path, *settings))
    assert sentence in str(caught.value)
    assert not (tmp_path / "latents").exists(), "refused before the latents are encoded"


def test_real_videos_train_resume_and_are_labeled(vae_config, shared_data, tmp_path):
    """Mixed sizes, rates and codecs, in class folders and a plain one."""
    clips = shared_data / "clips"
    settings = [f"data.root={clips}", "data.num_frames=4", "data.resolution=32", "data.num_validation_videos=2"]
    train_vae(vae_config(tmp_path, *settings, "train.max_train_steps=2"))
    final = train_vae(vae_config(tmp_path, *settings, "train.max_train_steps=4", "resume=latest"))
    assert list(losses(tmp_path)) == [1, 2, 3, 4]
    assert not (tmp_path / "bad_videos.jsonl").exists()

    from vidgen.data.dataset import ClipDataset

    dataset = ClipDataset(clips / "ucf101", num_frames=4, fps=4, resolution=32, train=False)
    assert [dataset.id2label[dataset[i]["label"]] for i in range(2)] == ["ApplyEyeMakeup", "BaseballPitch"]
    with torch.no_grad():
        reconstructed = AutoencoderKLVidTwin.from_pretrained(final)(dataset[0]["video"][None]).sample
    assert reconstructed.shape == (1, 3, 4, 32, 32)
    assert reconstructed.isfinite().all()


def test_muon_logs_both_learning_rates_and_differs_from_adamw(dit_config, tmp_path):
    for name in ("adamw", "muon"):
        train_dit(dit_config(tmp_path / name, "train.max_train_steps=5", f"optim.name={name}"))
    first, last = (numbers(tmp_path / "muon")[step] for step in (1, 5))
    for entry in (first, last):
        assert entry["learning_rate/matrices"] == entry["learning_rate"]
    assert last["grad_norm/matrices"] > 0 and losses(tmp_path / "adamw")[5] != losses(tmp_path / "muon")[5]


def test_muon_is_refused_where_matrices_are_split(vae_config, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "SHARDING", (DistributedType.NO,))
    with pytest.raises(UserError, match="needs complete tensors, which FSDP and DeepSpeed split: use adamw"):
        train_vae(vae_config(tmp_path, "optim.name=muon"))
