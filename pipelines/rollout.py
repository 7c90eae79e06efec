"""Videos longer than one clip: roll-outs in overlapping windows, loops, and interpolation between clips."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from autoencoder.latents import TwinLatents

from .conditioning import ConditioningInput, encode_conditioning
from .finite import check_finite_number, check_finite_output, check_finite_tensor
from .history import find_kept_rows
from .inputs import check_whole_numbers, common_length
from .latents import STREAMS, frames_per_position
from .pipeline_vidtwin import VidTwinPipeline
from .text import PROMPT_ARGUMENTS


def rollout(
    pipeline: VidTwinPipeline,
    num_frames: int,
    class_labels: int | str | list[int | str] | None = None,
    *,
    overlap: int | None = None,
    structure_strength: float = 0.5,
    dynamics_strength: float | None = None,
    history_noise: float | None = None,
    history_guidance_scale: float = 1.0,
    anchor_windows: int | None = None,
    match_colors: bool = False,
    loop: bool = False,
    first: torch.Tensor | None = None,
    image: ConditioningInput | None = None,
    **options: Any,
) -> torch.Tensor:
    """Generate videos of any length, window by window.

    A window starts with the last frames of the previous window, whose dynamics are kept. Its other frames start from
    the frames before those in reverse order, which continue the motion with known content, and are varied. Where two
    windows overlap, one fades into the other.

    With `history_noise`, for a model trained with `diffusion.frame_timesteps`, the shared frames are the history from
    which the others are generated, and the structure of every window starts from that of an anchor, the first window.
    So errors of the structure do not add up from window to window.

    Args:
        pipeline: with a model trained with a timestep per stream.
        num_frames: of the videos.
        class_labels: as in the pipeline.
        overlap: frames that a window shares with the previous one, 1 to half a window, in whole positions of the
            dynamics latent. None: 2, or one position if it has more frames; with history a quarter of a window.
        structure_strength, dynamics_strength: fraction of denoising steps applied to each window, from 0, which plays
            the video back and forth, to 1, which makes windows independent; of dynamics by default 0.6. With history
            that of dynamics is by default 1, which generates from noise; 0 of structure keeps the anchor's.
        history_noise: noise level at which the model sees the shared frames, from 0, clean, to below 1; None: no
            history. The encoder has not seen the frames that follow them, so a little noise, such as 0.1, fits better.
        history_guidance_scale: guidance by the shared frames above 1, as in the pipeline.
        anchor_windows: with history, windows after which the latest window becomes the anchor; None: never, which
            keeps the content; 1: every window varies the previous one.
        match_colors: give each color channel of every window the mean and the standard deviation that it has in the
            first window, so that colors drift less (adaptive instance normalization, arXiv 1703.06868, of RGB). For
            videos of one view: a change of content would be recolored.
        loop: generate a seamless loop: the last window ends with the first frames of the first window.
        first: the first window (B, T, 3, H, W) in [0, 1], one per video or one for all; None: generated.
        image: the first frame of the video, for a transformer with `image_conditioning`; later windows are conditioned
            on their first frames.
        options: further arguments of the pipeline, such as `prompt`, `num_videos_per_prompt`, `guidance_scale` and
            `generator`; `structure_delay` is of the first window.

    Returns:
        (B, num_frames, 3, H, W) in [0, 1].

    Raises:
        ValueError: if the overlap, the length of a loop, the number of first windows or an argument of history is
            invalid, the model was not trained for history, or the pipeline refuses an argument.
    """
    # Check inputs.
    has_history = history_noise is not None
    if dynamics_strength is None:
        dynamics_strength = 1.0 if has_history else 0.6
    check_finite_number("structure_strength", structure_strength)
    check_finite_number("dynamics_strength", dynamics_strength)
    check_history(history_noise, history_guidance_scale, anchor_windows)
    length, group = pipeline.autoencoder.clip_shape[1], frames_per_position(pipeline.autoencoder)
    if overlap is None:
        overlap = max(length // 4 // group * group, group) if has_history else max(2, group)
    check_whole_numbers(num_frames=num_frames, overlap=overlap)
    step = length - overlap
    if not 0 < overlap <= length // 2:
        raise ValueError(f"overlap must be 1 to {length // 2} for windows of {length} frames, not {overlap}.")
    if overlap % group:
        raise ValueError(f"overlap must be a multiple of {group}, the frames of a dynamics position, not {overlap}.")
    if has_history:
        find_kept_rows(pipeline.transformer, [frame // group for frame in range(overlap)])
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

    # Expand class labels and prompts to one per video; subclasses are drawn once, not per window.
    videos_per_label = options.pop("num_videos_per_prompt", 1)
    label_ids = None if class_labels is None else pipeline.get_label_ids(class_labels)
    inputs = {"class_labels": label_ids} | {name: options[name] for name in PROMPT_ARGUMENTS if name in options}
    lists = {name: value for name, value in inputs.items() if value is not None and not isinstance(value, str)}
    num_labels = common_length({name: len(value) for name, value in lists.items()})
    options |= {name: repeat_rows(value, num_labels, videos_per_label) for name, value in lists.items()}
    options |= {"output_type": "pt"}
    if label_ids is not None and first is None:
        options["class_labels"] = pipeline.draw_subclasses(options["class_labels"], options.get("generator"))
    num_videos = num_labels * videos_per_label
    videos_per_label = 1 if lists else videos_per_label
    if first is not None and len(first) == 1:
        first = first.expand(num_videos, *first.shape[1:])
    elif first is not None and num_videos not in (1, len(first)):
        raise ValueError(f"first has {len(first)} windows for {num_videos} videos: pass one, or one per video.")

    # Generate window after window; the last window of a loop also ends with the first frames.
    video = first
    if first is None:
        video = pipeline(num_videos_per_prompt=videos_per_label, image=image, **options).frames
    options.pop("structure_delay", None)  # later windows start from given streams
    options |= {"structure_strength": structure_strength, "dynamics_strength": dynamics_strength}
    if has_history:
        options |= {"history_noise": history_noise, "history_guidance_scale": history_guidance_scale}
    first_window, total, num_windows, anchor = video, num_frames + overlap * loop, 0, None
    while video.shape[1] < total:
        window = torch.cat([video[:, -overlap:], video[:, -length:-1].flip(1)[:, :step]], dim=1)
        kept_frames = list(range(overlap))
        if loop and video.shape[1] + step >= total:
            window = torch.cat([window[:, :step], video[:, :overlap]], dim=1)
            kept_frames += range(step, length)
        if image is not None:
            options["image"] = window[:, :1]
        structure = window
        if has_history:
            if anchor is None or (anchor_windows and num_windows % anchor_windows == 0):
                anchor = encode_structure(pipeline, video[:, -length:])
            structure = anchor
        window = pipeline(structure=structure, dynamics=window, kept_frames=kept_frames, **options).frames
        window = match_color_statistics(window, first_window) if match_colors else window
        num_windows += 1
        video = crossfade(video, window.to(video), overlap)
    if loop:
        tail, video = video[:, num_frames:], video[:, :num_frames]
        video = torch.cat([crossfade(tail, video[:, :overlap], overlap), video[:, overlap:]], dim=1)
    return video[:, :num_frames]


def check_history(history_noise: float | None, history_guidance_scale: float, anchor_windows: int | None) -> None:
    """Raise a `ValueError` for arguments of `rollout` about history that are out of range, or without history."""
    if history_noise is not None:
        check_finite_number("history_noise", history_noise)
        if not 0 <= history_noise < 1:
            raise ValueError(f"history_noise must be at least 0, clean, and below 1, pure noise, not {history_noise}.")
    if history_noise is None and (history_guidance_scale != 1 or anchor_windows is not None):
        name = "anchor_windows" if history_guidance_scale == 1 else "history_guidance_scale"
        raise ValueError(f"{name} requires history_noise, such as 0.1.")
    if anchor_windows is not None:
        check_whole_numbers(anchor_windows=anchor_windows)
        if anchor_windows < 1:
            raise ValueError(f"anchor_windows must be at least 1, not {anchor_windows}.")


def encode_structure(pipeline: VidTwinPipeline, clips: torch.Tensor) -> torch.Tensor:
    """Structure latents (B, d_S, n_q, h_S, w_S) of clips (B, T, 3, H, W) in [0, 1]."""
    with torch.no_grad():
        latents = encode_conditioning(clips, "structure", pipeline.autoencoder, pipeline._execution_device)
    return latents.unflatten(1, pipeline.autoencoder.structure_shape)


def repeat_rows(values: list | tuple | torch.Tensor, count: int, num_repeats: int) -> list | torch.Tensor:
    """Expand one row to `count`, and repeat each `num_repeats` times."""
    rows = [row for row in range(count) for _ in range(num_repeats)]
    rows = [0] * len(rows) if len(values) == 1 else rows
    return values[rows] if isinstance(values, torch.Tensor) else [values[row] for row in rows]


def crossfade(before: torch.Tensor, after: torch.Tensor, overlap: int) -> torch.Tensor:
    """Join two videos (B, T, 3, H, W), fading from one to the other over the frames that they share."""
    weight = torch.arange(1, overlap + 1, device=before.device, dtype=before.dtype) / (overlap + 1)
    shared = torch.lerp(before[:, -overlap:], after[:, :overlap], weight.view(-1, 1, 1, 1))
    return torch.cat([before[:, :-overlap], shared, after[:, overlap:]], dim=1)


def match_color_statistics(video: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Give each color channel of a video the mean and standard deviation, over frames and pixels, of a reference.

    Args:
        video, reference: (B, T, 3, H, W) in [0, 1]; the numbers of frames may differ.

    Returns:
        (B, T, 3, H, W), clipped to [0, 1]. A channel of equal values becomes the reference's mean.
    """
    axes = (1, 3, 4)
    reference = reference.to(video)
    deviation = video.std(axes, correction=0, keepdim=True)
    scale = reference.std(axes, correction=0, keepdim=True) / deviation.clamp(min=1e-4)
    centered = video - video.mean(axes, keepdim=True)
    return (centered * scale + reference.mean(axes, keepdim=True)).clamp(0, 1)


def interpolate(
    pipeline: VidTwinPipeline,
    a: ConditioningInput,
    b: ConditioningInput,
    shares: Sequence[float],
    *,
    streams: Sequence[str] = STREAMS,
    strength: float = 0.0,
    **options: Any,
) -> torch.Tensor:
    """Interpolate linearly between the latents of two clips, in one stream or in both.

    Args:
        pipeline: with a model trained with a timestep per stream if `strength` is above 0.
        a, b: one clip, image or `TwinLatents` each, as the pipeline's `structure` and `dynamics`.
        shares: interpolation ratios: 0 is `a`, 1 is `b`.
        streams: the interpolated streams; another stream is that of `a`.
        strength: fraction of denoising steps applied to the interpolated latents, which makes them more realistic and
            less like `a` and `b`; 0 decodes them unchanged.
        options: further arguments of the pipeline: `class_labels`, `generator` ...

    Returns:
        (shares, T, 3, H, W) in [0, 1].

    Raises:
        ValueError: for an unknown stream, more than one clip, or an argument that the pipeline refuses.
    """
    vae, device = pipeline.autoencoder, pipeline._execution_device
    unknown = set(streams) - set(STREAMS)
    if unknown:
        raise ValueError(f"streams must be among {', '.join(STREAMS)}, not {', '.join(sorted(unknown))}.")
    check_finite_number("shares", list(shares))
    weights = torch.tensor(list(shares), dtype=torch.float32, device=device)[:, None]
    latents = {}
    for stream in STREAMS:
        ends = [encode_conditioning(end, stream, vae, device, name=name) for name, end in (("a", a), ("b", b))]
        if any(len(end) != 1 for end in ends):
            raise ValueError(f"a and b must be one clip each, not {len(ends[0])} and {len(ends[1])}.")
        interpolated = torch.lerp(*ends, weights if stream in streams else torch.zeros_like(weights))
        latents[stream] = interpolated.unflatten(1, getattr(vae, f"{stream}_shape"))
    if strength == 0:
        with torch.no_grad():
            clips = vae.decode(TwinLatents(**latents).pack().to(vae.dtype)).sample
        check_finite_output("the autoencoder", clips, vae)
        return pipeline.video_processor.postprocess_video(clips, output_type="pt")
    strengths = {f"{stream}_strength": strength for stream in STREAMS}
    return pipeline(**latents, **strengths, output_type="pt", **options).frames
