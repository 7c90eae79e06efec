"""The best of several candidates, by a classifier."""

from __future__ import annotations

import json

import accelerate
import pytest
import torch

from pipelines import MotionClassifier, VidTwinPipeline
from pipelines.candidates import choose_candidates
from pipelines.overlay import apply_overlay

STEPS = 2


@pytest.fixture
def judged(pipe) -> VidTwinPipeline:
    """The pipeline with a classifier of random weights."""
    torch.manual_seed(3)
    classifier = MotionClassifier(["Diving", "Biking", "Yo Yo"], frame_size=(12, 12), width=4, points=2, dim=8).eval()
    pipeline = VidTwinPipeline(**pipe.components | {"classifier": classifier}, **pipe.parameters)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def seeded(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def sample(pipe, labels, **options) -> torch.Tensor:
    return pipe(labels, **{"num_inference_steps": STEPS, "output_type": "pt", **options}).frames


def probability(classifier, frames: torch.Tensor, label: str) -> torch.Tensor:
    return classifier.predict(2 * frames.transpose(1, 2) - 1)[:, classifier.config.classes.index(label)]


def test_the_most_probable_candidate_of_each_video_is_returned(judged):
    labels = ["Biking", "Yo Yo"]
    chosen = sample(judged, labels, num_candidates=4, generator=seeded(0, 1))
    positions = []
    for label, generator, found in zip(labels, seeded(0, 1), chosen, strict=True):
        candidates = torch.cat([sample(judged, label, generator=[generator]) for _ in range(4)])
        best = probability(judged.classifier, candidates, label).argmax()
        torch.testing.assert_close(found, candidates[best])
        positions.append(best.item())
    assert positions != [0, 0]  # otherwise the first candidate would pass


def test_one_candidate_is_the_pipeline_without_a_classifier(pipe, judged):
    assert torch.equal(
        sample(judged, [0, 2], num_candidates=1, generator=seeded(0, 1)), sample(pipe, [0, 2], generator=seeded(0, 1))
    )


def test_videos_of_a_prompt_have_their_own_candidates(judged):
    several = sample(judged, [0, 1], num_videos_per_prompt=2, num_candidates=3, generator=seeded(0, 1, 2, 3))
    for row, (label, seed) in enumerate([(0, 0), (0, 1), (1, 2), (1, 3)]):
        torch.testing.assert_close(several[row], sample(judged, label, num_candidates=3, generator=seeded(seed))[0])
    with pytest.raises(ValueError, match="2 generators were passed for 4 videos"):
        sample(judged, [0, 1], num_videos_per_prompt=2, num_candidates=3, generator=seeded(0, 1))


def test_ties_take_the_first_candidate_and_classes_their_own_score(judged):
    clips = torch.rand(3, 2, *judged.vae.clip_shape) * 2 - 1  # three candidates of two videos
    labels = ["Diving", "Biking"]
    found = choose_candidates(clips, labels, judged.classifier)
    for row, label in enumerate(labels):
        frames = (clips[:, row].transpose(1, 2) + 1) / 2
        assert torch.equal(found[row], clips[probability(judged.classifier, frames, label).argmax(), row])
    same = choose_candidates([clips[0], clips[0]], labels, judged.classifier)
    assert torch.equal(same, clips[0])


def test_candidates_are_judged_with_the_overlay(judged, make_transformer, monkeypatch):
    judged.register_modules(transformer=make_transformer(image_conditioning=True))
    image = torch.rand(1, 3, *judged.vae.clip_shape[2:])
    seen = []
    monkeypatch.setattr(
        "pipelines.pipeline_vidtwin.apply_overlay", lambda *a: seen.append(apply_overlay(*a)) or seen[-1]
    )
    monkeypatch.setattr("pipelines.pipeline_vidtwin.choose_candidates", lambda candidates, *_: candidates[-1])
    frames = sample(judged, [0, 1], image=image, num_candidates=3, generator=seeded(0, 1))
    assert len(seen) == 3
    torch.testing.assert_close(frames, (seen[-1] / 2 + 0.5).clamp(0, 1).transpose(1, 2))


def test_a_classifier_is_a_component_that_is_saved(judged, tmp_path):
    judged.save_pretrained(tmp_path)
    loaded = VidTwinPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    options = {"num_candidates": 3, "generator": seeded(5)[0]}
    assert torch.equal(sample(loaded, 1, **options), sample(judged, 1, **options | {"generator": seeded(5)[0]}))
    assert VidTwinPipeline.from_pretrained(tmp_path, classifier=None).classifier is None
    assert loaded.to(torch.bfloat16).classifier.dtype == torch.bfloat16
    assert sample(loaded, 1, num_candidates=2).isfinite().all()


def test_offloaded_candidates_are_those_in_memory(judged):
    options = {"num_candidates": 3, "generator": seeded(0, 1)}
    expected = sample(judged, [0, 1], **options)
    for model in (judged.vae, judged.transformer, judged.classifier):  # as `enable_sequential_cpu_offload`
        accelerate.cpu_offload(model, torch.device("cpu"))
    try:
        assert torch.equal(sample(judged, [0, 1], **options | {"generator": seeded(0, 1)}), expected)
    finally:
        for model in (judged.vae, judged.transformer, judged.classifier):
            accelerate.hooks.remove_hook_from_module(model, recurse=True)


def test_pipelines_of_earlier_versions_have_no_classifier(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index.pop("classifier") == [None, None]
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    assert VidTwinPipeline.from_pretrained(tmp_path).classifier is None


def test_what_cannot_be_chosen_is_refused(pipe, judged):
    def refuses(message: str, pipeline=judged, labels=0, **options):
        with pytest.raises(ValueError, match=message):
            sample(pipeline, labels, **{"num_candidates": 2, **options})

    refuses("requires a pipeline with a classifier", pipe)
    refuses('not output_type="latent"', output_type="latent")
    refuses("videos without class", labels=None)
    judged.classifier.register_to_config(classes=["Diving", "Biking"])
    refuses("num_candidates must be 1 for class 'Yo Yo': the classifier knows Diving, Biking", labels=[0, 2])
    refuses("num_candidates must be at least 1, not 0", num_candidates=0)
    refuses("num_candidates must be a whole number, not 2.5", num_candidates=2.5)
