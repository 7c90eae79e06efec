"""How fast VidTwin is on this machine, as ratios to what the machine can do, taken in one run.

    python benchmarks/speed.py                      every part
    python benchmarks/speed.py round_trip qformer   some parts
    python benchmarks/speed.py --scale smoke        the quickest

Parts: `round_trip` (encode + decode, released size), `train_step` (time and peak memory of a training step),
`dit_forward` (the DiT of the paper's size), `attention` (fused against plain matmuls), `qformer` (ours against
transformers' Blip2QFormerModel), `streaming` (`vidgen reconstruct` against reading, model and writing alone, and its
memory for a video ten times as long), `data` (clips against decoding alone, and how long a tiny training step waits
for them). Figures go to OUTPUT/speed.json (`--output`, default runs/benchmarks) and are printed as tables. With
OMP_NUM_THREADS=1 times are the thread's own: use it where the machine has other work.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
import torch.nn.functional as F
from av.video.reformatter import VideoReformatter
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader

from autoencoder import AutoencoderKLVidTwin
from autoencoder.attention import _matmul_attention
from autoencoder.qformer import QFormer
from pipelines import VidTwinTransformer3DModel
from vidgen import commands
from vidgen import streaming as streams
from vidgen.data.dataset import ClipDataset, collate_clips
from vidgen.data.sprites import write_sprites
from vidgen.data.streams import FrameReader, open_writer
from vidgen.environment import environment
from vidgen.files import written_aside
from vidgen.metrics.flops import clock, decode_flops, encode_flops, matmul_rate, transformer_flops

CLIP = (1, 3, 16, 224, 224)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Row = dict[str, Any]


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def seconds(run: Callable[[], Any], repeats: int = 5) -> float:
    """Median time after one warm-up."""
    run()
    taken = []
    for _ in range(repeats):
        start = clock(device())
        run()
        taken.append(clock(device()) - start)
    return statistics.median(taken)


def round_trip() -> list[Row]:
    """Encode + decode of the released size, batch 1, no_grad, against the measured matmul rate."""
    rows: list[Row] = []
    video = torch.rand(CLIP, device=device()) * 2 - 1
    for name, dtype in DTYPES.items():
        model = AutoencoderKLVidTwin.from_preset("released").to(device(), dtype).eval()
        clip, flops = video.to(dtype), encode_flops(model) + decode_flops(model)
        with torch.no_grad():
            z = model.encode(clip).latent_dist.mode()
            encode = seconds(lambda m=model, x=clip: m.encode(x), repeats=2)
            decode = seconds(lambda m=model, z=z: m.decode(z), repeats=2)
        rate = matmul_rate(device(), dtype)
        rows.append(
            {
                "dtype": name,
                "encode_s": encode,
                "decode_s": decode,
                "round_trip_s": encode + decode,
                "tflop": flops / 1e12,
                "matmul_gflops": rate / 1e9,
                "share_of_matmul_rate": flops / (encode + decode) / rate,
                "of_fp32_time": (encode + decode) / rows[0]["round_trip_s"] if rows else 1.0,
            }
        )
    return rows


def train_step() -> list[Row]:
    """Forward and backward at batch 1, and AdamW, each case in a process of its own for its peak memory."""
    cases = [("tiny", "fp32", False), ("tiny", "bf16", False)]
    cases += [("base", "fp32", False), ("base", "bf16", False), ("base", "bf16", True)]
    rows = []
    for case in cases:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            rows.append(pool.apply(_train_step, case))
        fp32 = next(row for row in rows if row["size"] == case[0])
        rows[-1]["of_fp32_time"] = rows[-1]["forward_backward_s"] / fp32["forward_backward_s"]
        rows[-1]["of_fp32_peak"] = rows[-1]["forward_backward_gib"] / fp32["forward_backward_gib"]
        print(rows[-1], flush=True)  # the last ones take minutes
    return rows


def _train_step(size: str, dtype: str, checkpointing: bool) -> Row:
    model = AutoencoderKLVidTwin.from_preset(size).to(device()).train()
    if checkpointing:
        model.enable_gradient_checkpointing()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    clip = torch.rand(1, *model.clip_shape, device=device()) * 2 - 1

    def forward_backward() -> None:
        optimizer.zero_grad()
        with torch.autocast(device().type, DTYPES[dtype], enabled=dtype != "fp32"):
            posterior = model.encode(clip).latent_dist
            out = model.decode(posterior.sample()).sample
        loss = F.l1_loss(out.float(), clip) + 1e-3 * posterior.kl().float().mean() / clip.numel()
        loss.backward()

    taken = seconds(forward_backward, repeats=5 if size == "tiny" else 2)
    peak = _peak_memory()  # before the optimizer has any state
    rate = matmul_rate(device(), DTYPES[dtype])
    update = seconds(optimizer.step, repeats=3)
    forward_backward()  # beside the optimizer's state
    return {
        "size": size,
        "parameters": model.num_parameters(),
        "dtype": dtype,
        "checkpointing": checkpointing,
        "forward_backward_s": taken,
        "step_s": taken + update,
        "forward_backward_gib": peak / 2**30,
        "step_gib": _peak_memory() / 2**30,
        "matmul_gflops": rate / 1e9,
        "share_of_matmul_rate": 3 * (encode_flops(model) + decode_flops(model)) / taken / rate,
    }


def _peak_memory() -> int:
    """Bytes: of the accelerator, or all that this process has."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def dit_forward() -> list[Row]:
    """The DiT of the paper's size, 18 x 1152 and 1008 tokens, batch 4, no_grad, against the measured matmul rate."""
    rows: list[Row] = []
    batch, classes = 4, 101
    model = VidTwinTransformer3DModel.from_preset("paper", num_classes=classes).to(device()).eval()
    flops = batch * transformer_flops(model)
    for name, dtype in DTYPES.items():
        model.to(dtype)
        latents = torch.randn(batch, model.latent_size, device=device(), dtype=dtype)
        timestep = torch.full((batch,), 500.0, device=device())
        labels = torch.arange(batch, device=device())
        with torch.no_grad():
            taken = seconds(lambda x=latents, t=timestep, y=labels: model(x, t, y), repeats=3)
        rate = matmul_rate(device(), dtype)
        rows.append(
            {
                "dtype": name,
                "tokens": sum(model.num_tokens),
                "batch": batch,
                "forward_s": taken,
                "tflop": flops / 1e12,
                "matmul_gflops": rate / 1e9,
                "share_of_matmul_rate": flops / taken / rate,
                "of_fp32_time": taken / rows[0]["forward_s"] if rows else 1.0,
            }
        )
    return rows


def attention() -> list[Row]:
    """The fused kernel against two plain matmuls, at the sequence lengths of VidTwin, Q-Former and DiT."""
    rows = []
    for what, batch, length, heads, dim in (
        ("temporal, 224 px", 196, 16, 12, 64),
        ("spatial, 224 px", 16, 196, 12, 64),
        ("Q-Former, 224 px", 196, 16, 8, 8),
        ("DiT, 1008 tokens", 1, 1008, 16, 72),
        ("DiT, 65 tokens", 8, 65, 16, 72),
    ):
        for name, dtype in DTYPES.items():
            qkv = torch.randn(3, batch, length, heads, dim, device=device(), dtype=dtype)

            def fused(q, k, v):
                return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)

            def matmul(q, k, v):
                return _matmul_attention(q, k, v, False, 0.0)

            row: Row = {"what": what, "length": length, "dtype": name}
            for backward in (False, True):
                times = []
                for function in (fused, matmul):
                    leaves = [x.clone().requires_grad_(backward) for x in qkv]
                    times.append(seconds(lambda f=function, x=leaves, b=backward: _attend(f, x, b)))
                row["forward + backward, fused / matmul" if backward else "forward, fused / matmul"] = (
                    times[0] / times[1]
                )
            rows.append(row)
    return rows


def _attend(function: Callable, leaves: list[torch.Tensor], backward: bool) -> None:
    with torch.set_grad_enabled(backward):
        out = function(*leaves)
    if backward:
        out.sum().backward()


def qformer() -> list[Row]:
    """Our Q-Former against transformers' at the paper's size, 196 places of 16 frames."""
    from transformers import Blip2QFormerConfig, Blip2QFormerModel

    rows = []
    for name, dtype in DTYPES.items():
        ours = QFormer(16, 64, 768, num_layers=6, num_heads=8, ffn_dim=768, dropout=0.0).to(device(), dtype)
        theirs = Blip2QFormerModel(
            Blip2QFormerConfig(
                hidden_size=64,
                num_hidden_layers=6,
                num_attention_heads=8,
                intermediate_size=768,
                encoder_hidden_size=768,
                hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
            )
        ).to(device(), dtype)
        context = torch.randn(196, 16, 768, device=device(), dtype=dtype)
        queries = ours.queries.detach().expand(196, -1, -1)

        def run_theirs(model=theirs, q=queries, x=context) -> torch.Tensor:
            return model(query_embeds=q, encoder_hidden_states=x).last_hidden_state

        def run_ours(model=ours, x=context) -> torch.Tensor:
            return model(x)

        row: Row = {"dtype": name}
        with torch.no_grad():
            row["forward, transformers / ours"] = seconds(run_theirs) / seconds(run_ours)
        times = [seconds(lambda f=f: f().sum().backward()) for f in (run_theirs, run_ours)]
        row["forward + backward, transformers / ours"] = times[0] / times[1]
        rows.append(row)
    return rows


def streaming() -> list[Row]:
    """`vidgen reconstruct` of 720p: its rate against the slowest of its three parts, and peak memory at 10x length."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        AutoencoderKLVidTwin.from_preset("tiny", sample_size=256, patch_size=32).save_pretrained(model)
        for frames in (48, 480):
            video = Path(folder) / f"{frames}.mp4"
            _write_drifting(video, frames, 30, (720, 1280))
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                rows.append(pool.apply(_reconstruct, (model, video)))
        short, long = rows
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            alone = pool.apply(_stages_alone, (model, Path(folder) / "480.mp4"))
        long |= alone
        long["of_slowest_part"] = long["fps"] / min(alone.values())
        long["of_short_peak"] = long["peak_gib"] / short["peak_gib"]
    return rows


def _write_drifting(path: Path, frames: int, fps: int, size: tuple[int, int], seed: int = 0) -> None:
    """A photograph-like texture drifting over the frame."""
    generator, (height, width) = torch.Generator().manual_seed(seed), size
    texture = torch.rand(1, 3, height // 8, width // 8, generator=generator)
    texture = F.interpolate(texture, size=size, mode="bicubic")[0]
    picture = (texture.clamp(0, 1) * 255).byte().permute(1, 2, 0).numpy()
    with open_writer(path, fps=fps, width=width, height=height) as writer:
        for i in range(frames):
            writer.write(np.roll(picture, (2 * i, 3 * i), (0, 1))[None])


def _reconstruct(model: Path, video: Path) -> Row:
    start = time.perf_counter()
    commands.reconstruct(str(video), str(video.with_name("out.mp4")), model=str(model))
    taken = time.perf_counter() - start
    frames = FrameReader(video).num_frames
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"frames": frames, "fps": frames / taken, "peak_gib": peak / 2**30}


def _stages_alone(model: Path, video: Path) -> Row:
    """Frames per second of reading, of the model and of writing, each with the machine to itself."""
    vae = AutoencoderKLVidTwin.from_pretrained(model).eval()
    rates: Row = {}
    with FrameReader(video) as reader:
        geometry = streams.video_geometry(vae, reader.num_frames, reader.height, reader.width)
        start = time.perf_counter()
        cut = [window for i, window in enumerate(streams.windows(reader, geometry)) if i < 8]
        rates["reading_fps"] = reader.num_frames / (time.perf_counter() - start)
    part = replace(geometry, size=(cut[-1].start + geometry.tile[0], *geometry.size[1:]))
    start = time.perf_counter()
    chunks = list(streams.decode_windows(streams.encode_windows(cut, vae), vae, part))
    # Windows overlap: their frames count once, as they do in the whole video.
    rates["model_fps"] = geometry.stride[0] * len(cut) / (time.perf_counter() - start)
    start = time.perf_counter()
    with open_writer(video.with_name("alone.mp4"), fps=30, width=1280, height=720) as writer:
        for chunk in chunks:
            writer.write(chunk)
    rates["writing_fps"] = sum(map(len, chunks)) / (time.perf_counter() - start)
    return rates


def data() -> list[Row]:
    """16 frames at 8 fps: decoding alone, `ClipDataset`, a loader with one worker; a tiny step's wait for data."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        sprites, larger = Path(folder) / "sprites", Path(folder) / "320x240"
        write_sprites(sprites, 8, seed=0)
        for number in range(12):
            _write_drifting(larger / f"{number}.mp4", 175, 25, (240, 320), seed=number)
        for name, root, size in (("64x64", sprites, 64), ("320x240", larger, 64), ("320x240", larger, 224)):
            rows.append(
                {"videos": name, "size": size, **_clip_rates(ClipDataset(root, 16, 8, size, clips_per_video=2))}
            )
        rows[0] |= _data_wait(ClipDataset(sprites, 16, 8, 64, clips_per_video=4))
    return rows


def _clip_rates(clips: ClipDataset) -> Row:
    """Clips a second, the best of three epochs each, taken in turns; the loader's by the clock, the others' of CPU."""
    loader = DataLoader(
        clips, batch_size=4, num_workers=1, persistent_workers=True, prefetch_factor=4, collate_fn=collate_clips
    )
    starts = [(clips.files[index % len(clips.files)].path, clips[index]["start"]) for index in range(len(clips))]
    ways: dict[str, Callable[[], Any]] = {
        "decode": lambda: [_decode_alone(path, start) for path, start in starts],
        "dataset": lambda: [clips[index] for index in range(len(clips))],
        "loader": lambda: list(loader),
    }
    times: dict[str, list[float]] = {way: [] for way in ways}
    for attempt in range(4):
        for way, run in ways.items():
            clock = time.perf_counter if way == "loader" else time.process_time  # which others' load disturbs less
            start = clock()
            run()
            if attempt:  # the first one starts the worker
                times[way].append(clock() - start)
    rates = {way: len(clips) / min(taken) for way, taken in times.items()}
    ratios = {f"{way} / decode": rates[way] / rates["decode"] for way in ("dataset", "loader")}
    return {f"{way}, clips/s": rate for way, rate in rates.items()} | ratios


def _decode_alone(path: Path, start: float) -> list[np.ndarray]:
    """The plainest way to a clip's frames: seek, decode in order up to the last, convert those wanted."""
    moments, frames, converter = [start + i / 8 for i in range(16)], [], VideoReformatter()
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_count = 1
        container.seek(int(start / stream.time_base), stream=stream)
        for frame in container.decode(stream):
            if moments and frame.time >= moments[0] - 0.5 / stream.average_rate:
                frames.append(converter.reformat(frame, format="rgb24", threads=1).to_ndarray())
                moments.pop(0)
            if not moments:
                break
    return frames


def _data_wait(clips: ClipDataset) -> Row:
    """The share of a tiny VAE's training that waits for the next batch, one worker, batch 4."""
    model = AutoencoderKLVidTwin.from_preset("tiny", sample_size=64, num_frames=16).to(device()).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    loader = DataLoader(
        clips, batch_size=4, num_workers=1, persistent_workers=True, prefetch_factor=4, collate_fn=collate_clips
    )
    waited = worked = 0.0
    for _epoch in range(2):
        mark = time.perf_counter()
        for number, batch in enumerate(loader):
            arrived = time.perf_counter()
            video = batch["video"].to(device())
            loss = F.l1_loss(model(video, sample_posterior=True).sample, video)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            clock(device())
            if number:  # before the first batch nothing can overlap
                waited, worked = waited + arrived - mark, worked + time.perf_counter() - arrived
            mark = time.perf_counter()
    return {"tiny step, s": worked / (2 * len(loader) - 2), "data wait": waited / (waited + worked)}


PARTS: dict[str, Callable[[], list[Row]]] = {
    "round_trip": round_trip,
    "train_step": train_step,
    "dit_forward": dit_forward,
    "attention": attention,
    "qformer": qformer,
    "streaming": streaming,
    "data": data,
}


def show(name: str, rows: list[Row], console: Console) -> None:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    table = Table(*columns, title=f"{name}: {(PARTS[name].__doc__ or '').splitlines()[0]}", title_justify="left")
    for row in rows:
        values = (row.get(key, "") for key in columns)
        table.add_row(*(f"{v:,.3g}" if isinstance(v, float) else str(v) for v in values))
    console.print(table)


SMOKE = ("attention",)


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; all without any")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks"))
    parser.add_argument("--scale", choices=("smoke", "cpu", "paper"), default="cpu", help="smoke: a few seconds")
    arguments = parser.parse_args(given)
    if unknown := [part for part in arguments.parts if part not in PARTS]:
        parser.error(f"unknown part {unknown[0]!r}; known: {', '.join(PARTS)}")
    console = Console(width=None if Console().is_terminal else 160)
    results: dict[str, Any] = {"environment": environment()}
    console.print(f"{results['environment']['device']}, torch {torch.__version__}")
    for part in arguments.parts or (SMOKE if arguments.scale == "smoke" else PARTS):
        results[part] = PARTS[part]()
        show(part, results[part], console)
        with written_aside(arguments.output / "speed.json") as path:
            path.write_text(json.dumps(results, indent=2))
    console.print(f"Figures in {arguments.output / 'speed.json'}.")


if __name__ == "__main__":
    main()
