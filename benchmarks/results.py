"""Render the pages of docs/results from their records, and draw their pictures: `make results`.

python -m benchmarks.results
"""

from __future__ import annotations

from . import ablations, disentanglement, patch_sizes, reconstruction, sampling, ucf101_fvd
from .common.harness import RESULTS, Benchmark
from .drift.__main__ import BENCHMARK as DRIFT
from .equal_compute.__main__ import BENCHMARK as EQUAL_COMPUTE
from .latents.__main__ import BENCHMARK as LATENTS
from .latents.__main__ import GIVEN as LATENTS_GIVEN
from .real.__main__ import BENCHMARK as REAL
from .resources.__main__ import RESOURCES, TRAINING_COST
from .speed.__main__ import BENCHMARK as SPEED
from .sprites.__main__ import BENCHMARK as SPRITES
from .text.__main__ import BENCHMARK as TEXT

BENCHMARKS = (
    reconstruction.BENCHMARK,
    LATENTS,
    LATENTS_GIVEN,
    ucf101_fvd.BENCHMARK,
    ablations.ABLATION,
    ablations.SCALING,
    ablations.RATES,
    disentanglement.BENCHMARK,
    RESOURCES,
    TRAINING_COST,
    SPRITES,
    REAL,
    TEXT,
    EQUAL_COMPUTE,
    DRIFT,
    sampling.BENCHMARK,
    sampling.REAL,
    patch_sizes.BENCHMARK,
    SPEED,
)


def list_recorded() -> list[Benchmark]:
    """The benchmarks that have a record in docs/results."""
    return [benchmark for benchmark in BENCHMARKS if list(RESULTS.glob(f"*/{benchmark.name}.json"))]


if __name__ == "__main__":
    for benchmark in list_recorded():
        print(benchmark.write_page(RESULTS))
