"""The best model of a run by a validation metric, kept in OUTPUT_DIR/best (`train.keep_best`)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ..common.errors import UserError

BEST, RECORD = "best", "best.json"  # the folder in OUTPUT_DIR; the file in it with metric, value and step
PREFIX = "validation/"  # under which validation metrics are logged
HIGHER_IS_BETTER = ("psnr", "ssim")  # beginnings of the names of such metrics; for all others lower is better


def higher_is_better(metric: str) -> bool:
    """Whether a larger value of a validation metric is better."""
    return metric.removeprefix(PREFIX).startswith(HIGHER_IS_BETTER)


def check_keep_best(metric: str | None, known: Sequence[str], hint: str = "") -> None:
    """Raise a `UserError` with the known metrics if `train.keep_best` names no validation metric of the run.

    Args:
        known: names of the run's validation metrics.
        hint: a sentence on how to get more of them.
    """
    if metric is None or metric.removeprefix(PREFIX) in known:
        return
    listed = f"the metrics of this run are {', '.join(known)}" if known else "this run has no validation metric"
    raise UserError(f"train.keep_best={metric} is not a validation metric: {listed}. {hint}".rstrip())


class BestModel:
    """The best value of a metric so far, and whether a new one is better.

    Attributes:
        record: `metric`, `value` and `step` of the best validation; empty before the first.
    """

    def __init__(self, metric: str | None) -> None:
        self.metric = metric.removeprefix(PREFIX) if metric else None
        self.record: dict[str, Any] = {}

    def update(self, values: Mapping[str, float], step: int) -> bool:
        """Note the values of a validation; returns whether the model is the best so far.

        A value that is not finite is never the best, and an equal one does not replace an earlier one.
        """
        value = values.get(self.metric) if self.metric else None
        if value is None or not math.isfinite(value):
            return False
        sign = -1 if higher_is_better(self.metric) else 1
        if self.record and sign * value >= sign * self.record["value"]:
            return False
        self.record = {"metric": self.metric, "value": value, "step": step}
        return True

    def load(self, record: Mapping[str, Any] | None) -> None:
        """Continue from the record in a checkpoint, unless it is of another metric."""
        if record and record.get("metric") == self.metric:
            self.record = dict(record)
