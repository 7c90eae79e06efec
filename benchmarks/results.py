"""Render the pages of docs/results from their records, and draw their pictures: `make results`.

python -m benchmarks.results
"""

from __future__ import annotations

from . import ablations, disentanglement, patch_sizes, reconstruction, sampling, ucf101_fvd
from .common.harness import RESULTS
from .resources.__main__ import RESOURCES, TRAINING_COST
from .speed.__main__ import BENCHMARK as SPEED
from .sprites.__main__ import BENCHMARK as SPRITES

BENCHMARKS = (
    reconstruction.BENCHMARK,
    ucf101_fvd.BENCHMARK,
    ablations.ABLATION,
    ablations.SCALING,
    ablations.RATES,
    disentanglement.BENCHMARK,
    RESOURCES,
    TRAINING_COST,
    SPRITES,
    sampling.BENCHMARK,
    patch_sizes.BENCHMARK,
    SPEED,
)

if __name__ == "__main__":
    for benchmark in BENCHMARKS:
        print(benchmark.write_page(RESULTS))
