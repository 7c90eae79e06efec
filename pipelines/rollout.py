"""Longer than one clip: roll-outs by windows that overlap, loops, and the way from one clip to another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from autoencoder.latents import TwinLatents

from .conditioning import STREAMS, Given, given_latent
from .finite import check_finite_number, check_finite_output, check_finite_tensor
from .inputs import check_whole_numbers
from .pipeline_vidtwin import VidTwinPipeline


def rollout(
    pipeline: VidTwinPipeline,
    num_frames: int,
    class_labels: int | str | list[int | str] | None = None,
    *,
    overlap: int = 2,
    structure_strength: float = 0.5,
    dynamics_strength: float = 0.6,
    loop: bool = False,
    first: torch.Tensor | None = None,
    **options: Any,
) -> torch.Tensor:
    """Videos of any length, made window by window.

    A window begins with the last frames of the one before, whose dynamics are kept. For the rest it starts from the
    frames before it run backwards, which go on from where it begins and show what was shown, and makes them anew in
    part. Where two windows have a frame in common, one fades into the other.

    Args:
        pipeline: of a model that was trained with a timestep for each stream.
        num_frames: of the videos.
        class_labels: as the pipeline takes them.
        overlap: frames that a window has in common with the one before, 1 to half of a window.
        structure_strength, dynamics_strength: how much of each stream a window makes anew, from 0, so that videos go
            back and forth, to 1, so that each window is another video.
        loop: let the last window end with the frames that the first one begins with: after its last frame the video
            goes on with its first.
        first: the first window (B, T, 3, H, W) in [0, 1], one for each video or one for all; generated where None.
        options: given on to the pipeline, such as `num_videos_per_prompt`, `guidance_scale` and `generator`.

    Returns:
        (B, num_frames, 3, H, W) in [0, 1].

    Raises:
        ValueError: if windows cannot overlap so or make no loop of this length, if first windows are neither one nor
            one for each video, or for what the pipeline refuses.
    """
    for name, strength in {"structure_strength": structure_strength, "dynamics_strength": dynamics_strength}.items():
        check_finite_number(name, strength)
    length = pipeline.vae.config.num_frames
    check_whole_numbers(num_frames=num_frames, overlap=overlap)
    step = length - overlap
    if not 0 < overlap <= length // 2:
        raise ValueError(f"overlap must be 1 to {length // 2} for windows of {length} frames, not {overlap}.")
    if num_frames < 1:
        raise ValueError(f"num_frames must be at least 1, not {num_frames}.")
    if loop and (num_frames % step or num_frames < 2 * step):
        near = step * max(2, round(num_frames / step))
        raise ValueError(
            f"A loop of windows of {length} frames that overlap by {overlap} has {2 * step}, {3 * step}, {4 * step} "
            f"... frames, not {num_frames}; the nearest is {near}."
        )
    if first is not None and first.shape[1] != length:
        raise ValueError(f"first must be a window of {length} frames, not of {first.shape[1]}.")
    if first is not None:
        check_finite_tensor("first", first)
    each = options.pop("num_videos_per_prompt", 1)
    options |= {"output_type": "pt"}
    if class_labels is not None:
        label_ids = [label for label in pipeline.get_label_ids(class_labels) for _ in range(each)]
        if first is None:  # or each window would draw its own
            label_ids = pipeline.draw_subclasses(label_ids, options.get("generator"))
        options["class_labels"] = label_ids
        each = 1
    videos = len(options.get("class_labels", range(each)))
    if first is not None and len(first) == 1:
        first = first.expand(videos, *first.shape[1:])
    elif first is not None and videos not in (1, len(first)):
        raise ValueError(f"first has {len(first)} windows for {videos} videos; give one, or one for each.")
    video = pipeline(num_videos_per_prompt=each, **options).frames if first is None else first
    options |= {"structure_strength": structure_strength, "dynamics_strength": dynamics_strength}
    whole = num_frames + overlap * loop
    while video.shape[1] < whole:
        closing = loop and video.shape[1] + step >= whole
        start = torch.cat([video[:, -overlap:], video[:, -length:-1].flip(1)[:, :step]], dim=1)
        known = list(range(overlap))
        if closing:
            start = torch.cat([start[:, :step], video[:, :overlap]], dim=1)
            known += range(step, length)
        window = pipeline(structure=start, dynamics=start, kept_frames=known, **options).frames
        video = faded(video, window.to(video), overlap)
    if loop:
        tail, video = video[:, num_frames:], video[:, :num_frames]
        video = torch.cat([faded(tail, video[:, :overlap], overlap), video[:, overlap:]], dim=1)
    return video[:, :num_frames]


def faded(before: torch.Tensor, after: torch.Tensor, overlap: int) -> torch.Tensor:
    """Two videos (B, T, 3, H, W) as one that fades from one to the other over the frames they have in common."""
    share = torch.arange(1, overlap + 1, device=before.device, dtype=before.dtype) / (overlap + 1)
    common = torch.lerp(before[:, -overlap:], after[:, :overlap], share.view(-1, 1, 1, 1))
    return torch.cat([before[:, :-overlap], common, after[:, overlap:]], dim=1)


def interpolate(
    pipeline: VidTwinPipeline,
    a: Given,
    b: Given,
    shares: Sequence[float],
    *,
    streams: Sequence[str] = STREAMS,
    strength: float = 0.0,
    **options: Any,
) -> torch.Tensor:
    """Clips on the straight way between two, in one latent or in both.

    Args:
        pipeline: of a model that was trained with a timestep for each stream, where `strength` is above 0.
        a, b: one clip, still or `TwinLatents` each, as the pipeline's `structure` and `dynamics`.
        shares: where on the way: 0 is `a`, 1 is `b`.
        streams: those that go from `a` to `b`; another one stays as in `a`.
        strength: how much of the latents the model makes anew, which makes what lies between more like a clip, and
            all of them a little less like `a` and `b`; 0 decodes them as they are.
        options: given on to the pipeline: `class_labels`, `generator` ...

    Returns:
        (shares, T, 3, H, W) in [0, 1].

    Raises:
        ValueError: for an unknown stream, more than one clip, or what the pipeline refuses.
    """
    vae, device = pipeline.vae, pipeline._execution_device
    unknown = set(streams) - set(STREAMS)
    if unknown:
        raise ValueError(f"streams must be of {', '.join(STREAMS)}, not {', '.join(sorted(unknown))}.")
    check_finite_number("shares", list(shares))
    way = torch.tensor(list(shares), dtype=torch.float32, device=device)[:, None]
    latents = {}
    for stream in STREAMS:
        ends = [given_latent(end, stream, vae, device) for end in (a, b)]
        if any(len(end) != 1 for end in ends):
            raise ValueError(f"a and b must be one clip each, not {len(ends[0])} and {len(ends[1])}.")
        between = torch.lerp(*ends, way if stream in streams else torch.zeros_like(way))
        latents[stream] = between.unflatten(1, getattr(vae, f"{stream}_shape"))
    if strength == 0:
        with torch.no_grad():
            clips = vae.decode(TwinLatents(**latents).pack().to(vae.dtype)).sample
        check_finite_output("the autoencoder", clips, vae)
        return pipeline.video_processor.postprocess_video(clips, output_type="pt")
    strengths = {f"{stream}_strength": strength for stream in STREAMS}
    return pipeline(**latents, **strengths, output_type="pt", **options).frames
