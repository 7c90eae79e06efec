"""The denoising steps of structure and dynamics, which may begin and end at different times."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class StreamSchedule:
    """The scheduler's timestep of each stream at each step of the sampling.

    Attributes:
        timesteps: of the scheduler (N,).
        waits: steps for which structure and dynamics wait before their first; one number if they are denoised as one.
        skips: number of the first timesteps that they leave out.
    """

    timesteps: torch.Tensor
    waits: tuple[int, ...] = (0,)
    skips: tuple[int, ...] = (0,)

    @classmethod
    def from_strengths(cls, timesteps: torch.Tensor, strengths: tuple[float, float]) -> StreamSchedule:
        """Each stream takes the last timesteps only, a fraction of them: 0 keeps its latents, 1 ignores them."""
        starts = tuple(len(timesteps) - round(len(timesteps) * strength) for strength in strengths)
        return cls(timesteps, starts, starts)

    @classmethod
    def with_structure_delay(cls, timesteps: torch.Tensor, delay: float) -> StreamSchedule:
        """Both streams take all timesteps; structure begins a fraction `delay` of N steps after dynamics."""
        return cls(timesteps, (round(len(timesteps) * delay), 0), (0, 0))

    def __len__(self) -> int:
        """The number of steps."""
        return len(self.timesteps) + max(self._offsets)

    def at(self, stream: int, step: int) -> torch.Tensor | None:
        """The 0-d timestep at which a stream is denoised in a step; None if it waits."""
        index = step - self._offsets[stream]
        return self.timesteps[index] if step >= self.waits[stream] and index < len(self.timesteps) else None

    def latest(self, step: int) -> torch.Tensor:
        """The 0-d timestep of the stream that ends last, for callbacks and guiders."""
        return self.timesteps[max(step - max(self._offsets), 0)]

    def is_any(self, values: list[bool]) -> list[bool]:
        """For each step whether the value of a timestep, one of N, is true for any of the streams."""
        count = len(self.timesteps)
        return [
            any(values[step - offset] for offset in self._offsets if 0 <= step - offset < count)
            for step in range(len(self))
        ]

    def model_timesteps(self) -> torch.Tensor:
        """The timestep of the transformer in each step: (steps,), or (steps, 2) with one per stream.

        A stream that has not begun waits at its first timestep; one that has ended, or never begins, is clean, at 0.
        """
        padded = torch.cat([self.timesteps, self.timesteps.new_zeros(1)])
        return self._squeeze([padded[indices] for indices in self._indices()])

    def target_timesteps(self, clean: int) -> torch.Tensor:
        """The timestep that each step leads to, as `model_timesteps`; a stream that waits stays where it is.

        Args:
            clean: the timestep of clean latents, after the last step.
        """
        following = torch.cat([self.timesteps[1:], torch.full_like(self.timesteps[:1], clean)])
        columns = list(self.model_timesteps().view(len(self), -1).clone().unbind(1))
        for column, indices, wait in zip(columns, self._indices(), self.waits, strict=True):
            moves = (torch.arange(len(self)) >= wait) & (indices < len(self.timesteps))
            column[moves] = following[indices[moves]]
        return self._squeeze(columns)

    @property
    def _offsets(self) -> list[int]:
        """For each stream the difference between a step's number and the index of its timestep."""
        return [wait - skip for wait, skip in zip(self.waits, self.skips, strict=True)]

    def _indices(self) -> list[torch.Tensor]:
        """For each stream the index (steps,) of its timestep; N once it has ended."""
        steps, count = torch.arange(len(self)), len(self.timesteps)
        pairs = zip(self._offsets, self.skips, strict=True)
        return [(steps - offset).clamp(skip, count) for offset, skip in pairs]

    def _squeeze(self, columns: list[torch.Tensor]) -> torch.Tensor:
        return columns[0] if len(columns) == 1 else torch.stack(columns, dim=1)
