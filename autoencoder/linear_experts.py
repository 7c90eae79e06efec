"""Several linear encoders and decoders per location of the structure latent, of which a router mixes or chooses.

One basis cannot fit both still blocks, whose values go to fine detail, and moving ones, whose values go to change over
time. Experts do: each has a separate basis, fitted to the blocks that it reconstructs best. A location's first value
says which expert encoded it; the decoder reads it there.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

MAX_ROUNDS = 20  # of the assignment of blocks to experts
MIN_PROGRESS = 1e-3  # relative decrease of the squared error, below which rounds end
MIN_ENERGY = 1e-4  # of a band of a block, in squared amplitudes: far below a gray level
NOISE = 1 / 8  # standard deviation of the first value, as a part of the distance of two experts


class Experts(nn.Module):
    """sum_k softmax(router(hints))_k (W_k x + b_k)."""

    def __init__(self, in_features: int, out_features: int, experts: int, hints: int) -> None:
        super().__init__()
        self.linear = nn.Linear(in_features, experts * out_features)
        self.router = nn.Linear(hints, experts)
        self.in_features, self.out_features = in_features, out_features

    def forward(self, x: torch.Tensor, hints: torch.Tensor) -> torch.Tensor:
        """(..., in_features) and (..., hints) -> (..., out_features)."""
        outputs = self.linear(x).unflatten(-1, (-1, self.out_features))
        return torch.einsum("...k,...kn->...n", self.router(hints).softmax(dim=-1), outputs)

    @torch.no_grad()
    def set_expert(self, number: int, weight: torch.Tensor, bias: torch.Tensor) -> None:
        """Set W_k (out_features, in_features) and b_k (out_features,)."""
        rows = slice(number * self.out_features, (number + 1) * self.out_features)
        self.linear.weight[rows] = weight.to(self.linear.weight)
        self.linear.bias[rows] = bias.to(self.linear.bias)


class ExpertEncoder(Experts):
    """Features of a location to its values. Hints are the logarithms of the features' energies by band.

    Args:
        shape: of the features: channels, slow temporal frequencies, vertical and horizontal frequencies.
        out_features: number of values of a location.
        experts: their number.
    """

    def __init__(self, shape: tuple[int, int, int, int], out_features: int, experts: int) -> None:
        channels, slow, rows, columns = shape
        self.shape, self.middle = shape, (rows // 2, columns // 2)
        super().__init__(channels * slow * rows * columns, out_features, experts, hints=4 * slow)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(..., features) -> (..., values)."""
        return super().forward(features, self.measure_bands(features))

    def measure_bands(self, features: torch.Tensor) -> torch.Tensor:
        """Log energies (..., 4 slow): of every temporal frequency, in the quadrants of the spatial frequencies."""
        energies = features.unflatten(-1, self.shape).square().sum(dim=-4)
        row_halves, column_halves = ((slice(half), slice(half, None)) for half in self.middle)
        quadrants = [energies[..., rows, columns] for rows in row_halves for columns in column_halves]
        return (torch.stack([part.sum(dim=(-2, -1)) for part in quadrants], dim=-1) + MIN_ENERGY).log().flatten(-2)


class ExpertDecoder(Experts):
    """Values of a location to its features. Hints are the values."""

    def __init__(self, in_features: int, out_features: int, experts: int) -> None:
        super().__init__(in_features, out_features, experts, hints=in_features)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """(..., values) -> (..., features)."""
        return super().forward(values, values)


def expert_levels(experts: int) -> torch.Tensor:
    """The first value of each expert's locations: evenly spaced, of mean 0 and variance 1."""
    levels = torch.linspace(-1, 1, experts, dtype=torch.float64)
    return levels / levels.square().mean().sqrt()


@torch.no_grad()
def fit_experts(
    encoder: ExpertEncoder, decoder: ExpertDecoder, features: torch.Tensor, min_std: float
) -> torch.Tensor:
    """Set both to the principal components of clusters of locations, by k-subspaces.

    Components of all experts are rotated to resemble those of all locations, so a value means nearly the same to each.

    Args:
        features: of locations, (N, features).
        min_std: smallest standard deviation by which a value is scaled.

    Returns:
        Standard deviations of the components of all values, (values,); that of the first is chosen so that noise of
        `min_std` is a part of the distance of two experts.
    """
    count, components = encoder.router.out_features, encoder.out_features - 1
    assigned = assign_locations(encoder, features, count, components)
    _, reference = principal_components(features, components)

    # Fit every expert to its locations, and scale their values alike.
    experts, squares = [], torch.zeros(components, dtype=torch.float64, device=features.device)
    for number in range(count):
        own = features[assigned == number]
        mean, basis = principal_components(own, components)
        u, _, v = torch.linalg.svd(basis.T @ reference)
        experts.append((mean, basis @ u @ v))
        squares += ((own - mean) @ experts[-1][1]).double().square().sum(dim=0)
    stds = (squares / len(features)).sqrt().clamp(min=min_std).float()
    levels = expert_levels(count).to(features)
    for number, (mean, basis) in enumerate(experts):
        weight = basis.T / stds[:, None]
        encoder.set_expert(number, F.pad(weight, (0, 0, 1, 0)), torch.cat([levels[number, None], -weight @ mean]))
        decoder.set_expert(number, F.pad(basis * stds, (1, 0)), mean)

    # The encoder's router learns the assignment; the decoder's chooses the nearest level.
    distance = (levels[1] - levels[0]).item()
    fit_router(encoder.router, encoder.measure_bands(features), assigned)
    nearest = levels / (distance / 4) ** 2
    decoder.router.weight.zero_()
    decoder.router.weight[:, 0] = nearest
    decoder.router.bias.copy_(-nearest * levels / 2)
    return torch.cat([stds.new_tensor([min_std / (NOISE * distance)]), stds])


def assign_locations(encoder: ExpertEncoder, features: torch.Tensor, count: int, components: int) -> torch.Tensor:
    """Assign every location to the expert with the least squared error, in rounds: int64 (N,)."""
    change = features.unflatten(-1, encoder.shape)[:, :, 1:].square().sum(dim=(1, 2, 3, 4))
    assigned = change.argsort().argsort() * count // len(features)
    before = torch.inf
    for _ in range(MAX_ROUNDS):
        errors = torch.stack([squared_errors(features, features[assigned == k], components) for k in range(count)])
        least, assigned = errors.min(dim=0)
        error = least.double().sum().item()
        if before - error <= MIN_PROGRESS * error:
            break
        before = error
    return assigned


def squared_errors(features: torch.Tensor, own: torch.Tensor, components: int) -> torch.Tensor:
    """Squared error (N,) of every location in the principal components of an expert's own locations."""
    mean, basis = principal_components(own, components)
    centered = features - mean
    return centered.square().sum(dim=1) - (centered @ basis).square().sum(dim=1)


def principal_components(features: torch.Tensor, components: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean (F,) and orthonormal principal components (F, components) of features (N, F)."""
    mean = features.mean(dim=0) if len(features) else features.new_zeros(features.shape[1])
    centered = features - mean
    _, vectors = torch.linalg.eigh((centered.T @ centered).double() / max(len(features), 1))
    return mean, vectors.flip(1)[:, :components].float()


def fit_router(router: nn.Linear, hints: torch.Tensor, assigned: torch.Tensor) -> None:
    """Fit a multinomial logistic regression of the experts on the hints."""
    mean, std = hints.mean(dim=0), hints.std(dim=0).clamp(min=1e-3)
    inputs = (hints - mean) / std
    with torch.enable_grad():
        fitted = nn.Linear(router.in_features, router.out_features, device=hints.device)
        nn.init.zeros_(fitted.weight)
        nn.init.zeros_(fitted.bias)
        optimizer = torch.optim.LBFGS(fitted.parameters(), max_iter=100, line_search_fn="strong_wolfe")

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(fitted(inputs), assigned) + 1e-4 * fitted.weight.square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)
    router.weight.copy_(fitted.weight / std)
    router.bias.copy_(fitted.bias - (fitted.weight / std) @ mean)
