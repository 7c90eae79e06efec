"""Quality against sampling cost: smoke scale, costs and verdicts."""

from __future__ import annotations

import json
from functools import partial

import diffusers
import pytest
import torch
from PIL import Image

from autoencoder import AutoencoderKLVidTwin
from benchmarks import sampling
from benchmarks.common import harness
from benchmarks.sampling import CACHES, REFERENCE, SETTINGS, Setting
from pipelines import VidTwinPipeline, VidTwinTransformer3DModel, default_scheduler
from vidgen.data.sprites import write_sprites
from vidgen.metrics import fvd
from vidgen.metrics.flops import transformer_flops
from vidgen.metrics.frechet import bootstrap_interval
from vidgen.metrics.fvd import Sampling

STEPS = 6
TWICE = Sampling(guidance_scale=2.0)


@pytest.fixture(scope="module")
def pipeline() -> VidTwinPipeline:
    """A pipeline with large random weights and few tokens."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    vae = AutoencoderKLVidTwin.from_preset("tiny-test", bottleneck="residual").eval()
    structure, dynamics = vae.structure_shape, vae.dynamics_shape
    patches = {"structure_patch_size": (structure[1], 2, 2), "dynamics_patch_size": (2, dynamics[2])}
    transformer = VidTwinTransformer3DModel.from_preset("tiny-test", vae=vae, num_classes=8, **patches).eval()
    for parameter in transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    made = VidTwinPipeline(vae, transformer, default_scheduler())
    made.set_progress_bar_config(disable=True)
    return made


def test_smoke(work_dir, monkeypatch):
    torch.set_num_threads(1)
    monkeypatch.setattr(fvd, "bootstrap_interval", partial(bootstrap_interval, resamples=4))
    arguments = ["--scale", "smoke", "--work-dir", str(work_dir)]
    sampling.BENCHMARK.main(arguments)
    found = json.loads((work_dir / "smoke" / "sampling.json").read_text())["results"]
    settings = found["settings"]
    assert list(settings) == [
        "default 5",
        "DPM-Solver++ 2",
        "default 5, guidance 0.2 to 0.8",
        "default 5, FirstBlock 0.05",
    ]
    assert found["reference"] == "default 5" and found["solver"] == "DDIMScheduler"
    assert [(row["calls"], row["rows"]) for row in settings.values()] == [(5, 10), (2, 4), (5, 8), (5, 10)]
    assert settings["default 5"]["time"] == 1.0 and settings["default 5"]["difference"] == 0
    for row in settings.values():
        distance = row["distance"]
        assert 0 < distance["interval"][0] <= distance["value"] <= distance["interval"][1]
        assert distance["samples"] == 24 and row["seconds"] > 0
        assert row["time_range"][0] <= row["time"] <= row["time_range"][1]
    assert settings["default 5"]["distance"] == found["evaluation"]["generated"]
    text = (work_dir / "sampling.md").read_text()
    assert "| DPM-Solver++ 2 |" in text and "guidance 2, detector `pooled_pixels`, protocol `sprites`" in text
    assert Image.open(work_dir / "smoke" / "sampling.png").size[0] > 600

    # Every setting has its features on disk, and none is computed twice.
    features = work_dir / "ucf101_fvd" / "features"
    before = {path: path.stat().st_mtime_ns for path in features.rglob("generated-*/*")}
    assert len({path.parent for path in before}) >= len(settings)
    sampling.BENCHMARK.main(arguments)
    assert {path: path.stat().st_mtime_ns for path in features.rglob("generated-*/*")} == before


def test_clips_of_any_data(work_dir, monkeypatch):
    """Clips have the pipeline's size and the data's classes; the record is beside that of sprites."""
    torch.set_num_threads(1)
    monkeypatch.setattr(fvd, "bootstrap_interval", partial(bootstrap_interval, resamples=4))
    arguments = ["sampling_real", "--scale", "smoke", "--work-dir", str(work_dir), "--samples", "8"]
    if not (sprites := work_dir / "data" / "sprites" / "fvd").exists():
        write_sprites(sprites, 6, seed=2, resolution=32, num_frames=8)
    harness.main(sampling.BENCHMARK, sampling.REAL, arguments=[*arguments, "--data", str(sprites)])
    evaluation = json.loads((work_dir / "smoke" / "sampling_real.json").read_text())["results"]["evaluation"]
    assert evaluation["protocol"] | {"frames": 4, "size": [32, 32], "labels": "real"} == evaluation["protocol"]
    assert evaluation["generated"]["samples"] == 8
    assert "smoke/sampling.png" not in (work_dir / "sampling_real.md").read_text()


def test_flops_calls_and_latent_differences(pipeline):
    settings = [
        Setting("fewer steps", steps=STEPS),
        Setting("guidance", steps=STEPS, guidance_interval=None),
        Setting("guidance", steps=STEPS, guidance_interval=(0.0, 0.5)),
        Setting("UniPC", "UniPC", 2),
        Setting("caches", steps=STEPS, cache="Pyramid 2"),
    ]
    costs = sampling.measure_costs(pipeline, settings, TWICE, clips=3, rounds=2)
    plain, unguided, half, unipc, pyramid = (costs[setting.name] for setting in settings)
    assert [cost["calls"] for cost in (plain, unguided, half, unipc, pyramid)] == [6, 6, 6, 2, 6]
    assert [cost["rows"] for cost in (plain, unguided, half, unipc, pyramid)] == [12, 6, 9, 4, 12]
    forward = transformer_flops(pipeline.transformer)
    for cost in (plain, unguided, half, unipc):
        assert cost["flops"] == pytest.approx(cost["rows"] * forward)
    assert 0.5 * plain["flops"] < pyramid["flops"] < 0.95 * plain["flops"], "a cache skips attention"
    assert plain["difference"] == 0
    assert all(costs[setting.name]["difference"] > 1e-3 for setting in settings[1:])
    assert plain["time"] == 1 and set(costs["reference_repeated"]) == {"seconds", "time", "time_range", "one_clip"}


def test_flops_of_a_model_that_takes_prompts(pipeline):
    transformer = VidTwinTransformer3DModel.from_preset(
        "tiny-test", vae=pipeline.vae, num_classes=8, caption_channels=8
    )
    of_text = VidTwinPipeline(pipeline.vae, transformer.eval(), default_scheduler())
    of_text.set_progress_bar_config(disable=True)
    costs = sampling.measure_costs(of_text, [Setting("fewer steps", steps=2)], TWICE, clips=2, rounds=1)
    assert costs["default 2"]["flops"] == pytest.approx(4 * transformer_flops(transformer))


def test_times_are_relative_to_the_reference_of_the_same_round(pipeline, monkeypatch):
    readings = iter([0, 2, 2, 3, 3, 6, 6, 10, 10, 11, 11, 15])  # reference, UniPC, the reference again; twice
    monkeypatch.setattr(sampling, "clock", lambda _: next(readings))
    settings = [Setting("fewer steps", steps=1), Setting("UniPC", "UniPC", 1)]
    costs = sampling.measure_costs(pipeline, settings, TWICE, clips=1, rounds=2)
    assert costs["UniPC 1"]["time"] == 0.375 and costs["UniPC 1"]["time_range"] == [0.25, 0.5]
    assert costs["reference_repeated"]["time_range"] == [1.0, 1.5] and costs["default 1"]["seconds"] == 3


def test_one_clip_is_timed_too(pipeline, monkeypatch):
    batches = []
    monkeypatch.setattr(sampling, "_generate", lambda *arguments: batches.append(arguments[2]))
    monkeypatch.setattr(sampling, "_count_work", lambda *_: (torch.zeros(3, 1), {}))
    readings = iter([0, 6, 6, 9, 9, 15, 15, 17, 17, 18, 18, 20])  # three clips, then one
    monkeypatch.setattr(sampling, "clock", lambda _: next(readings))
    settings = [Setting("fewer steps", steps=1), Setting("UniPC", "UniPC", 1)]
    costs = sampling.measure_costs(pipeline, settings, TWICE, clips=3, rounds=1)
    assert batches == [3, 3, 3, 1, 1, 1]
    assert (costs["UniPC 1"]["seconds"], costs["UniPC 1"]["time"]) == (1, 0.5)
    assert costs["UniPC 1"]["one_clip"] == {"seconds": 1, "time": 0.5, "time_range": [0.5, 0.5]}
    assert costs["default 1"]["one_clip"]["seconds"] == 2


@pytest.mark.parametrize("cache", CACHES)
def test_every_cache_works_and_is_removed(pipeline, cache):
    settings = [Setting("fewer steps", steps=STEPS), Setting("caches", steps=STEPS, cache=cache)]
    costs = sampling.measure_costs(pipeline, settings, TWICE, clips=1, rounds=1)
    plain, cached = (costs[setting.name] for setting in settings)
    assert 0 < cached["difference"] < float("inf") or cached["flops"] == plain["flops"]
    assert not pipeline.transformer.is_cache_enabled


def test_a_setting_restores_the_pipeline(pipeline):
    own = pipeline.scheduler
    with pytest.raises(RuntimeError), sampling.apply_setting(Setting("x", "UniPC", 5, cache="TaylorSeer 2"), pipeline):
        assert isinstance(pipeline.scheduler, diffusers.UniPCMultistepScheduler)
        assert pipeline.scheduler.config.prediction_type == "sample"
        assert pipeline.transformer.is_cache_enabled
        raise RuntimeError
    assert pipeline.scheduler is own and not pipeline.transformer.is_cache_enabled


def test_a_model_without_classes_has_no_guidance_settings(pipeline):
    class Unconditional:
        class transformer:
            class config:
                num_classes = None

    assert sampling.settings_for(pipeline, "cpu") == list(SETTINGS)
    left = sampling.settings_for(Unconditional, "cpu")
    assert left[0] == REFERENCE and {setting.family for setting in left} == {
        "fewer steps",
        "DPM-Solver++",
        "UniPC",
        "caches",
    }


def test_names_of_settings_are_unique():
    assert len({setting.name for setting in SETTINGS}) == len(SETTINGS) and SETTINGS[0] == REFERENCE


def figures(**found: tuple[str, float, float]) -> dict:
    """Results of settings by name: family, distance, time. The reference's interval is 0.9 to 1.1."""
    settings = {"default 50": ("fewer steps", 1.0, 1.0), **found}
    rows = {
        name: {
            "family": family,
            "steps": 50,
            "distance": {"value": value, "interval": [value - 0.1, value + 0.1], "samples": 9, "real_samples": 9},
            "time": time,
            "flops": 100 * time,
            "calls": 50,
            "rows": 100.0,
            "difference": 0.25,
            "seconds": time,
            "one_clip": {"seconds": time, "time": time / 2},
        }
        for name, (family, value, time) in settings.items()
    }
    one = {"value": 0.3, "interval": [0.2, 0.4], "samples": 9, "real_samples": 9}
    evaluation = {"generated": one, "real_vs_real": one, "reconstructed": one, "detector": {"name": "d"}}
    evaluation["mean_color"] = {**one, "value": 5.0}
    evaluation |= {"protocol": {"name": "p"}, "settings": {"guidance_scale": 2.0}}
    repeated = {"time_range": [0.98, 1.02]}
    common = {
        "solver": "DDIMScheduler",
        "reference": "default 50",
        "evaluation": evaluation,
        "reference_repeated": repeated,
    }
    return {**common, "clips_timed": 8, "rounds": 7, "settings": rows}


def test_verdicts():
    found = figures(
        a=("solver", 1.05, 0.5), b=("solver", 1.1, 0.2), c=("solver", 1.2, 0.1), d=("guidance", 0.5, 0.7),
        e=("slow", 1.0, 1.2), f=("far", 3.0, 0.5), g=("far", 2.0, 0.6),
    )  # fmt: skip
    verdicts = {
        family: sampling.verdict(family, found) for family in ("solver", "guidance", "slow", "far", "fewer steps")
    }
    assert verdicts["solver"] == "solver: b is the fastest with a distance of at most 1.1: 1.1 in 0.20 of the time."
    assert "d is the fastest with a distance of at most 1.1: 0.5 in 0.70" in verdicts["guidance"]
    for family in ("slow", "far", "fewer steps"):
        nothing = f"{family}: no other setting is faster and has a distance of at most 1.1."
        assert verdicts[family] == nothing


def test_every_family_is_in_the_plot():
    names = [setting.family for setting in (*SETTINGS, *sampling.FEW_STEPS)]
    found = figures(**{f"{family} {i}": (family, 1.0, 0.5) for i, family in enumerate(names)})
    drawn = [label.get_text() for axes in sampling.plot(found).axes for label in axes.get_legend().get_texts()]
    assert set(names) <= set(drawn)


def test_table_of_relative_costs():
    text = sampling.tables(figures(a=("caches", 1.05, 0.5), b=("UniPC", 1.2, 0.25)))
    assert "| default 50 | 1 | 0.9 to 1.1 | 1.00 | 0.50 | 1.00 | 50 | 100 |  |" in text
    assert "| a | 1.05 | 0.95 to 1.15 | 0.50 | 0.25 | 0.50 | 50 | 100 | 0.25 |" in text
    assert "| b | 1.2 | 1.1 to 1.3 | 0.25 | 0.12 | 0.25 | 50 | 100 |  |" in text
    assert "the reference repeated: 0.98 to 1.02" in text and text.count("\n* ") == 3


def test_no_verdicts_for_an_untrained_model():
    found = figures(a=("UniPC", 1.0, 0.25))
    assert "a is the fastest" in sampling.tables(found)
    found["evaluation"]["mean_color"]["value"] = 0.2
    text = sampling.tables(found)
    assert "the fastest" not in text and text.endswith("the distances are meaningless.")


def test_missing_options_are_named(capsys, tmp_path):
    for arguments, message in (
        (["--scale", "cpu"], "name a pipeline, as train_dit.py leaves it"),
        (["--detector", "pooled_pixels", "--detector", "pooled_pixels"], "name one --detector"),
    ):
        with pytest.raises(SystemExit) as exit_code:
            sampling.BENCHMARK.main([*arguments, "--work-dir", str(tmp_path)])
        assert exit_code.value.code == 2
        assert message in capsys.readouterr().err


def test_the_settings_of_a_few_step_model_use_its_transformer(pipeline):
    """One row per clip and step, without guidance."""
    torch.manual_seed(1)
    own, vae = pipeline.transformer, pipeline.vae
    few_steps = VidTwinTransformer3DModel.from_preset("tiny-test", vae=vae, num_classes=8, interval_conditioning=True)
    scheduler, pipeline.scheduler = pipeline.scheduler, default_scheduler("v_prediction")
    settings = [Setting("fewer steps", steps=STEPS), *sampling.FEW_STEPS]
    costs = sampling.measure_costs(pipeline, settings, TWICE, clips=1, rounds=1, few_steps=few_steps.eval())
    pipeline.scheduler = scheduler
    assert [(costs[setting.name]["calls"], costs[setting.name]["rows"]) for setting in settings] == [
        (6, 12),
        (1, 1),
        (2, 2),
        (4, 4),
    ]
    assert pipeline.transformer is own and settings[-1].name == "few-step model 4"
