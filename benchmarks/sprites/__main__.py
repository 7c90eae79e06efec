"""One model, four jobs: what the model of sprites generates, animates, retargets and rolls out, judged by a scorer.

    python -m benchmarks.sprites --scale cpu --pipeline FOLDER
    python -m benchmarks.sprites --scale cpu --pipeline FOLDER --ablations

The scorer is trained first, on sprites of its own, and says on others how far it can be trusted. With `--ablations`
DiTs are trained on the latents of the pipeline's autoencoder, from one seed and for as many steps each: by the recipe,
and with one thing less. Started again after an interruption it goes on; a training by other settings than those asked
for is refused.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState

from benchmarks import ucf101_fvd
from benchmarks.common import vae_runs
from pipelines import VidTwinPipeline
from pipelines.rollout import rollout
from vidgen.common.config import config_fields, load_config, nested_config
from vidgen.common.errors import UserError
from vidgen.common.io import atomic_dir
from vidgen.common.loading import load_pipeline, load_vae, weights_hash
from vidgen.common.precision import place_model
from vidgen.data.sprites import MOTIONS
from vidgen.training.config import DiTTrainingConfig
from vidgen.training.dit_trainer import train_dit

from ..common.harness import REPOSITORY, Benchmark, Results, markdown_table
from .classifier import DrawnSprites, SpriteScorer, train_scorer
from .latent_swap import CLASSES
from .rollouts import rollout_scores, seam_starts
from .tasks import SpriteJobs, SpriteSampling, kept

SCORER = {"smoke": dict(steps=2, batch_size=4, sprites=16, width=8, dim=8), "cpu": dict(steps=1500, batch_size=16)}
SCORER_SIZES = {"num_frames": 16, "resolution": 64}  # of the clips of a scorer whose folder does not name them
SEEDS = {"scorer": 1000, "tested": 2000, "others": 3000}  # of sprites; trainings have small ones
PER_MOTION = {"smoke": 2, "cpu": 32}  # sprites to compare with, and clips made for each job
ROLLOUTS = {"smoke": 1, "cpu": 4}  # of each motion
ROLLOUT_FRAMES, OVERLAP = 64, 2
STEPS = {"smoke": 2, "cpu": 25}
STRENGTHS = (0.0, 0.5)  # of what is given
# Trained with one thing less than the recipe, which is the first.
ABLATIONS: dict[str, list[str]] = {
    "the recipe": [],
    "one timestep for both streams": ["diffusion.independent_timesteps=0"],
    "no self-conditioning": ["model.overrides.self_conditioning=false"],
    "no zero terminal SNR": ["diffusion.zero_terminal_snr=false"],
}
ABLATION_STEPS = {"smoke": 2, "cpu": 2000}
PLACES = ("vae", "output_dir", "latent_cache", "resume")  # settings that say where things lie, not what is trained
SMOKE = [
    *("model.overrides.structure_patch_size=[3,2,2]", "model.overrides.dynamics_patch_size=[4,4]"),
    *("model.overrides.num_layers=1", "model.overrides.num_attention_heads=1", "data.num_frames=4", "data.fps=4"),
    *("train.mixed_precision=no", "train.ema_decay=0", "optim.lr_warmup_steps=0"),  # so that two steps leave a trace
]
READ = {  # as `kept` has them, with what they are in
    "motion": "moves as the sprite's class",
    "shape": "shape",
    "colors": "colors off, RGB distance (441 at most)",
    "position": "place off, pixels",
}


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--pipeline", metavar="FOLDER", help="of a model of sprites, trained with a timestep a stream")
    parser.add_argument("--ablations", action="store_true", help="train and judge the recipe with one thing less, too")
    parser.add_argument("--data", metavar="FOLDER", help="sprites to train ablations on (default: 80 of each motion)")
    parser.add_argument("--guidance", type=float, default=3.0, help="classifier-free guidance (default: 3)")


def run(options: argparse.Namespace) -> Results | None:
    scale = options.scale
    if scale == "paper":
        raise UserError("sprites are this project's own, and have no --scale paper: take --scale cpu.")
    if options.pipeline is None and scale == "smoke":
        options.pipeline = ucf101_fvd.train_tiny(options.work_dir / "ucf101_fvd")
    if options.pipeline is None:
        raise UserError(
            "name a pipeline that was trained on sprites, with a timestep for each stream: --pipeline FOLDER."
        )
    pipeline = _load(options.pipeline, options.dtype)
    if missing := [motion for motion in MOTIONS if motion not in pipeline.labels]:
        raise UserError(f"the pipeline must know the motions of sprites as classes; it has no {missing[0]!r}.")
    sizes = dict(zip(("num_frames", "resolution"), pipeline.vae.clip_shape[1:3], strict=True))
    count = len(MOTIONS) * PER_MOTION[scale]
    sprites, others = (DrawnSprites(count, SEEDS[name], **sizes) for name in ("tested", "others"))
    asked = ABLATIONS if options.ablations else {}
    # Before the scorer: a process keeps the precision of its first `Accelerator`, and a recipe insists on its own.
    folders = {name: trained(name, settings, options) for name, settings in asked.items()}
    scorer = scorer_of(options, sizes)
    ablations = {
        name: judged(_load(folder, options.dtype), scorer, sprites, others, options, strengths=(0.0,))
        for name, folder in folders.items()
    }
    if not PartialState().is_main_process:
        return None
    return {
        "pipeline": str(options.pipeline),
        "sampling": {"steps": STEPS[scale], "guidance": options.guidance},
        "scorer": kept(scorer.read(others.clips()), others.targets),
        **judged(pipeline, scorer, sprites, others, options, STRENGTHS),
        "reconstruct": jobs_of(pipeline, scorer, sprites, options).reconstruct(),
        "rollouts": rolled_out(pipeline, scorer, options),
        "ablations": ablations,
    }


def _load(folder: str | Path, dtype: str) -> VidTwinPipeline:
    pipeline = place_model(load_pipeline(str(folder)), PartialState().device, dtype)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def scorer_of(options: argparse.Namespace, sizes: dict[str, int]) -> SpriteScorer:
    """The work folder's scorer of clips of these sizes, trained unless it has been, on the process's device."""
    folder = options.work_dir / "sprites" / "scorer"
    if sizes != SCORER_SIZES:
        folder = folder.with_name("scorer-{num_frames}x{resolution}".format(**sizes))
    if not (folder / "config.json").exists():
        scorer = train_scorer(Accelerator(), seed=SEEDS["scorer"], **sizes, **SCORER[options.scale])
        if PartialState().is_main_process:
            with atomic_dir(folder) as aside:
                scorer.save_pretrained(aside)
        PartialState().wait_for_everyone()
    return SpriteScorer.from_pretrained(folder).to(PartialState().device).eval()


def trained(name: str, settings: Sequence[str], options: argparse.Namespace) -> Path:
    """The pipeline of a DiT that the recipe with these settings gives, trained unless it has been.

    Raises:
        UserError: if the folder holds a training by other settings, and whatever the training raises.
    """
    folder = options.work_dir / "sprites" / name.replace(" ", "-")
    if options.data is None:
        data = vae_runs.data_sets(argparse.Namespace(**{**vars(options), "clips": None}))["sprites"][:1]
    else:
        data = [f"data.root={options.data}"]
    own = [*data, f"vae={options.pipeline}", f"latent_cache={folder.parent / 'latents'}"]
    own += [
        f"output_dir={folder}",
        f"train.max_train_steps={ABLATION_STEPS[options.scale]}",
        "train.report_to=none",
        "resume=latest",
    ]
    own += [*(SMOKE if options.scale == "smoke" else ()), *settings]
    recipe = REPOSITORY / "configs" / "dit" / "sprites_long.yaml"
    config = load_config(DiTTrainingConfig, ["--config", str(recipe), *own])
    finished = (folder / "final" / "model_index.json").exists()
    if finished or (folder / "config.yaml").exists():
        differences = trained_otherwise(folder, config)
        if finished and _rounded_hash(folder / "final") != _rounded_hash(config.vae):
            differences.append(f"on another autoencoder than that of {config.vae}")
        if differences:
            raise UserError(
                f"{folder} was trained {', '.join(differences)}: delete it first, or ask for what it was trained with."
            )
    return folder / "final" if finished else train_dit(config)


def trained_otherwise(folder: Path, config: DiTTrainingConfig) -> list[str]:
    """In what a run's settings differ from those of a config, in words, but for where its files and autoencoder lie.

    Data are told by their path. An unfinished run's latent cache refuses another autoencoder's latents by itself.
    """
    saved = load_config(DiTTrainingConfig, ["--config", str(folder / "config.yaml")])
    leaves = [key for key, f in config_fields(DiTTrainingConfig).items() if nested_config(f) is None]
    keys = [key for key in leaves if key not in PLACES]
    was, now = (
        {key: attrgetter(key)(one) for key in keys} | {"data.root": str(Path(one.data.root).resolve())}
        for one in (saved, config)
    )
    return [f"with {key} {was[key]}, not {now[key]}" for key in keys if was[key] != now[key]]


def _rounded_hash(vae: str | Path) -> str:
    """Of an autoencoder's weights in bf16, which those of the model in the box are rounded to."""
    return weights_hash(load_vae(str(vae)).bfloat16())


def jobs_of(
    pipeline: VidTwinPipeline, scorer: SpriteScorer, sprites: DrawnSprites, options: argparse.Namespace
) -> SpriteJobs:
    return SpriteJobs(pipeline, scorer, sprites, SpriteSampling(STEPS[options.scale], options.guidance))


def judged(
    pipeline: VidTwinPipeline,
    scorer: SpriteScorer,
    sprites: DrawnSprites,
    others: DrawnSprites,
    options: argparse.Namespace,
    strengths: Sequence[float],
) -> dict[str, Any]:
    """How a pipeline generates, animates and retargets."""
    jobs = jobs_of(pipeline, scorer, sprites, options)
    return {
        "denoise": jobs.denoise(),
        "generate": jobs.generate(others),
        "animate": {str(strength): jobs.animate(strength) for strength in strengths},
        "retarget": {str(strength): jobs.retarget(strength) for strength in strengths},
    }


def rolled_out(pipeline: VidTwinPipeline, scorer: SpriteScorer, options: argparse.Namespace) -> dict[str, Any]:
    """Roll-outs of every class, of four windows and more, and how they hold together."""
    window = pipeline.vae.config.num_frames
    labels = torch.arange(len(MOTIONS)).repeat_interleave(ROLLOUTS[options.scale])
    frames = ROLLOUT_FRAMES if options.scale == "cpu" else 3 * window
    videos = rollout(
        pipeline,
        frames,
        [MOTIONS[label] for label in labels.tolist()],
        overlap=OVERLAP,
        guidance_scale=options.guidance,
        num_inference_steps=STEPS[options.scale],
        generator=[torch.Generator().manual_seed(i) for i in range(len(labels))],
    )
    clips = 2 * videos.float().cpu().transpose(1, 2) - 1
    return {"frames": frames, "overlap": OVERLAP, "videos": len(labels)} | rollout_scores(
        clips, labels, scorer, window=window, overlap=OVERLAP
    )


# --- what is shown ---------------------------------------------------------------------------------------------------


def tables(results: Results | None) -> str:
    if results is None:
        return ""
    sampling, made = results["sampling"], results["generate"]
    real = results["scorer"]
    said = (
        f"Scorer: on {made['clips']} real sprites it has not seen it tells the motion of {_text(real, 'motion')}, the "
        f"shape of {_text(real, 'shape')}, the texture of {_text(real, 'texture')}; colors are "
        f"{_text(real, 'colors')} off, a distance in RGB of levels of 255, so at most 441, and places "
        f"{_text(real, 'position')} pixels. In the tables, in brackets the middle 95 % of bootstrap resamples, after "
        f"the bar what chance gives. {sampling['steps']} steps, guidance {sampling['guidance']:g}."
    )
    rebuilt = results["reconstruct"]
    psnr = {name: f"{score['value']:.2f} dB" for name, score in rebuilt["psnr"].items()}
    floor = (
        f"Rebuilt by the autoencoder, from {rebuilt['rate']:.2%} of a clip's values: {psnr['reconstructed']} PSNR; "
        f"the clip shrunk to as many values {psnr['downsample']}, its mean color {psnr['color']}."
    )
    read = {"motion": "accuracy", "shape": "shape"} if "shape" in made else {"motion": "accuracy"}
    rows = [
        [name, *(_figure(made[key][name]) for key in read.values()), f"{made['distance'][name]:.3g}"]
        for name in ("generated", "reconstructed", "real")
    ]
    header = [f"{made['clips']} clips", *(f"{name} read rightly" for name in read), "Fréchet distance"]
    generated = markdown_table(header, rows)
    classes = markdown_table(
        ["class", "generated clips read rightly"], [[name, _figure(made["per_class"][name])] for name in MOTIONS]
    )
    parts = [said, floor, "Generated by class:", generated, classes]
    for job, given, done in (("animate", "structure", "animated"), ("retarget", "dynamics", "retargeted")):
        header = [f"{job}: {given} made anew", *READ.values()]
        by_strength = results[job]
        rows = [[f"{float(strength):.0%}", *_row(scores[done])] for strength, scores in by_strength.items()]
        rows.append(["both latents of the sprite", *_row(next(iter(by_strength.values()))["reconstructed"])])
        parts.append(markdown_table(header, rows))
    if results["ablations"]:
        parts += ["Trained alike for fewer steps, and with one thing less:", ablation_table(results["ablations"])]
    return "\n\n".join([*parts, rollout_text(results["rollouts"])])


def ablation_table(ablations: dict[str, dict[str, Any]]) -> str:
    header = ["trained", "error of clean latents", "motion read rightly", "Fréchet distance"]
    header += ["animate: shape kept", "retarget: motion kept"]
    rows = []
    for name, found in ablations.items():
        animated = found["animate"]["0.0"]["animated"]["shape"]
        retargeted = found["retarget"]["0.0"]["retargeted"]["motion"]
        made = found["generate"]
        distance = f"{made['distance']['generated']:.3g}"
        figures = [_figure(score) for score in (made["accuracy"]["generated"], animated, retargeted)]
        rows.append([name, f"{found['denoise']['error']:.4f}", figures[0], distance, *figures[1:]])
    return markdown_table(header, rows)


def rollout_text(found: dict[str, Any]) -> str:
    seams = found["seams"]
    rows = [
        [window["first_frame"], *(_figure(window[name]) for name in ("motion", "shape", "colors"))]
        for window in found["windows"]
    ]
    header = ["a window's length from frame", "moves as its class", "first window's shape"]
    header += ["colors off the first's, RGB distance"]
    said = f"Roll-outs: {found['videos']} videos of {found['frames']} frames, windows overlap by {found['overlap']}."
    if "jumps" in seams:
        said += (
            f" Between windows pixels change {seams['change']:.2f} times as much as within, shapes move "
            f"{seams['moved']:.2f} times as far; {seams['jumps']:.1%} of the steps there are jumps, longer by a "
            "quarter and a pixel than any of the video's first window."
        )
    return f"{said}\n\n{markdown_table(header, rows)}"


def _row(scores: dict[str, dict[str, float]]) -> list[str]:
    return [_figure(scores[name]) for name in READ]


def _text(scores: dict[str, dict[str, float]], name: str) -> str:
    form = ".1%" if name in CLASSES else ".3g"
    return f"{scores[name]['value']:{form}} (chance {scores[name]['chance']:{form}})"


def _figure(score: dict[str, float]) -> str:
    text = f"{score['value']:.3g} ({score['low']:.3g} to {score['high']:.3g})"
    return text if score.get("chance") is None else f"{text} \\| {score['chance']:.3g}"


def plot(results: Results, path: Path) -> None:
    """What strengths leave of what is given, and how roll-outs drift."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.6), dpi=110, layout="constrained")
    kept_axes, drift_axes, change_axes = figure.subplots(1, 3)
    for job, name, done, color in (
        ("animate", "shape", "animated", "#2563eb"),
        ("retarget", "motion", "retargeted", "#d97706"),
    ):
        strengths = [float(strength) for strength in results[job]]
        scores = [found[done][name] for found in results[job].values()]
        kept_axes.plot(strengths, [s["value"] for s in scores], "o-", color=color, label=f"{job}: {name} kept")
        kept_axes.plot(strengths, [s["chance"] for s in scores], ":", color=color, lw=1)
    kept_axes.set_xlabel("share of the given latent made anew")
    kept_axes.set_ylabel("share of clips (dots: chance)")
    rolled = results["rollouts"]
    frames = [window["first_frame"] for window in rolled["windows"]]
    for name, words, color in (
        ("motion", "moves as its class", "#d97706"),
        ("shape", "has the first window's shape", "#2563eb"),
    ):
        drift_axes.plot(frames, [w[name]["value"] for w in rolled["windows"]], "o-", color=color, label=words)
    drift_axes.set_xlabel("first frame of a window's length")
    for axes in (kept_axes, drift_axes):
        axes.set_ylim(0, 1.03)
        axes.legend(frameon=False, fontsize=8, loc=(0.02, 0.2))
    change_axes.plot(range(1, len(rolled["moved"]) + 1), rolled["moved"], color="#1e3a8a")
    step, overlap = frames[1] - frames[0], rolled["overlap"]  # roll-outs have three windows and more
    for frame in seam_starts(rolled["frames"], step + overlap, overlap):
        change_axes.axvspan(frame - 0.5, frame + overlap + 0.5, color="#e5e7eb", lw=0)
    change_axes.set_ylim(0)
    change_axes.set_xlabel("frame (gray: windows meet)")
    change_axes.set_ylabel("pixels that the shape moves")
    for axes in (kept_axes, drift_axes, change_axes):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


BENCHMARK = Benchmark(
    name="sprites",
    title="One model, four jobs, on sprites",
    needs="other clips than sprites, which are this project's own and small",
    run=run,
    tables=tables,
    plot=plot,
    add_options=add_options,
)

if __name__ == "__main__":
    BENCHMARK.main()
