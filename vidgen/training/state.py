"""State of a run: its progress, the metrics since the last log entry, and the step that is not committed yet."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.utils import gather_object

from ..losses import Losses


@dataclass
class TrainState:
    """Progress of a run: optimizer steps taken, and samples seen by all processes together."""

    step: int = 0
    samples: int = 0


@dataclass
class MetricAverager:
    """Means of scalars since the last log entry, kept on the device."""

    sums: Losses = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def add(self, terms: Losses) -> None:
        for name, value in terms.items():
            value = value.detach().float()
            self.sums[name] = self.sums[name] + value if name in self.sums else value
            self.counts[name] = self.counts.get(name, 0) + 1

    def compute(self) -> Losses:
        return {name: value / self.counts[name] for name, value in self.sums.items()}

    def state_dict(self) -> dict[str, Any]:
        """The sums of every process and the counts, as JSON. Must be called on every process."""
        sums = gather_object([{name: value.item() for name, value in self.sums.items()}])
        return {"sums": sums, "counts": self.counts}

    def load_state_dict(self, state: dict[str, Any], process_index: int, device: torch.device) -> None:
        sums = state["sums"][process_index % len(state["sums"])]
        self.sums = {name: torch.tensor(value, device=device) for name, value in sums.items()}
        self.counts = state["counts"]


@dataclass
class PendingStep:
    """An optimizer step whose flags have not been read by the host.

    Attributes:
        batches, losses: of its micro-batches.
        norms: gradient norms before clipping, by name.
        flags: (2,) on the host, valid once `ready`: positive where a value was not finite; where a process was asked
            to stop.
        ready: recorded on the device after the flags were sent; None on a CPU.
    """

    batches: list[Any] = field(default_factory=list)
    losses: list[Losses] = field(default_factory=list)
    norms: Losses = field(default_factory=dict)
    flags: torch.Tensor | None = None
    ready: torch.cuda.Event | None = None

    def terms(self) -> Losses:
        """The means of the losses over the micro-batches, and the gradient norms."""
        means = {
            name: torch.stack([losses[name].detach() for losses in self.losses]).mean() for name in self.losses[0]
        }
        return means | self.norms

    def send_flags(self, flags: torch.Tensor) -> None:
        """Start the copy of the flags to the host."""
        self.flags = flags.to("cpu", non_blocking=True)
        if flags.device.type == "cuda":
            self.ready = torch.cuda.Event()
            self.ready.record()

    def read_flags(self) -> tuple[bool, bool]:
        """Wait for the flags: whether a value was not finite, and whether a process was asked to stop."""
        if self.ready is not None:
            self.ready.synchronize()
        not_finite, stop = self.flags.tolist()
        return not_finite > 0, stop > 0
