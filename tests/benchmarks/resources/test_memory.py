"""Memory of a training step, compared with arithmetic, PyTorch's tracker and the allocator of a CPU."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed._tools.mem_tracker import MemTracker
from torch.nn.attention import sdpa_kernel
from torch.profiler import ProfilerActivity, profile

from benchmarks.resources.memory import ATTENTION, training_memory
from benchmarks.resources.pseudo_dit import PseudoDiT
from pipelines import VidTwinTransformer3DModel

FLOAT = 4


def squared_error(model, x, target):
    return (model(x) - target).square().mean()


def pseudo_dit(tokens=40, projections=False):
    """2 layers, 4 heads, width 32, feed-forward 96."""

    def build():
        model = PseudoDiT(2, 4, 32, 96, projections)
        return model, lambda *inputs: squared_error(model, *inputs), tuple(torch.randn(2, 1, tokens, 32))

    return build


def our_dit():
    model = VidTwinTransformer3DModel.from_preset("tiny-test", num_classes=5)
    latent = torch.randn(1, model.latent_size)
    inputs = latent, torch.zeros(1, 2), torch.zeros(1, dtype=torch.long)
    return model, lambda x, t, y: (model(x, t, y).sample - x).square().mean(), inputs


def two_layers():
    model = nn.Sequential(nn.Linear(8, 16, bias=False), nn.ReLU(), nn.Linear(16, 4, bias=False))
    return model, lambda *inputs: squared_error(model, *inputs), (torch.randn(32, 8), torch.randn(32, 4))


def test_two_linear_layers_by_hand():
    memory = training_memory(two_layers)
    weights, hidden, out = FLOAT * (8 * 16 + 16 * 4), FLOAT * 32 * 16, FLOAT * 32 * 4
    assert memory.parameters == memory.gradients == weights
    assert memory.optimizer == 2 * weights + 2 * FLOAT  # two moments, and a step count for each layer
    assert memory.activations == hidden + out + FLOAT  # outputs of the ReLU and of the model, the loss
    inputs = FLOAT * 32 * (8 + 4)
    # In the ReLU's backward pass: its output, the gradients of its output and of its input; behind them the second
    # layer's gradient; the loss and its gradient.
    at_most = 3 * hidden + FLOAT * 16 * 4 + 2 * FLOAT
    assert memory.peak == weights + memory.optimizer + inputs + at_most


@pytest.mark.parametrize("tokens", [40, 7])
def test_activations_of_a_transformer_by_hand(tokens):
    n, d, f, heads, layers = tokens, 32, 96, 4, 2
    block = 5 * n * d + 2 * n * f + 4 * n  # norms, attention, two sums; feed-forward; means and deviations
    fused = block + heads * n  # the scores' log-sum-exp
    math = block + n * d + heads * n**2  # scaled queries and keys in place of the output; the weights
    for attention, values in (("fused", fused), ("math", math)):
        memory = training_memory(pseudo_dit(tokens), attention)
        assert memory.activations == FLOAT * (layers * values + 1)


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("build", [pseudo_dit(), pseudo_dit(projections=True), our_dit, two_layers])
def test_counted_memory_equals_cpu_allocations(build, attention):
    counted = training_memory(build, attention)
    with sdpa_kernel(ATTENTION[attention]):
        model, loss_function, inputs = build()
        optimizer = torch.optim.Adam(model.parameters(), fused=True)

        def step() -> None:
            optimizer.zero_grad()
            loss_function(*inputs).backward()
            optimizer.step()

        step()
        optimizer.zero_grad()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            step()
        tracker = MemTracker()
        tracker.track_external(model, optimizer, *inputs)
        optimizer.zero_grad()
        with tracker:
            step()
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = torch.tensor([event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]).cumsum(0)
    fixed = counted.parameters + counted.optimizer + sum(x.nbytes for x in (*inputs, *model.buffers()))
    assert counted.peak == fixed + held.max()
    assert counted.gradients == held[-1]
    assert counted.peak == tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]


def test_inputs_of_one_storage_count_once():
    def build():
        model, loss_function, inputs = two_layers()
        both = torch.randn(2, 32, 8)
        return model, lambda x, other, target: loss_function(x + other, target), (*both, inputs[1])

    def apart():
        model, loss_function, inputs = build()
        return model, loss_function, tuple(x.clone() for x in inputs)

    assert training_memory(build) == training_memory(apart)


def test_the_optimizer_makes_no_copies():
    def build():
        model = nn.Linear(100, 100, bias=False)
        return model, lambda x: model(x).mean(), (torch.randn(1, 100),)

    memory = training_memory(build)
    few = 10 * FLOAT * 100  # of one token
    assert memory.peak < memory.parameters + memory.gradients + memory.optimizer + few


def test_nothing_is_allocated():
    def build():
        model = nn.Linear(2**20, 2**20, bias=False)  # 4 TiB
        return model, lambda x: model(x).mean(), (torch.randn(1, 2**20),)

    assert training_memory(build).parameters == 2**42
