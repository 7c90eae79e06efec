"""I3D against a second writing of it, and the files of its weights in each layout."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from vidgen.common.errors import UserError
from vidgen.common.weights import file_sha256
from vidgen.metrics.detectors import get_detector
from vidgen.metrics.i3d import I3D, MIXED, load_i3d

State = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def state() -> State:
    """Random weights, scaled so that activations neither vanish nor explode; as the published files, no counters."""
    g = torch.Generator().manual_seed(0)
    state = {}
    with torch.device("meta"):
        shapes = {key: tensor.shape for key, tensor in I3D().state_dict().items() if "num_batches" not in key}
    for key, shape in shapes.items():
        if key.endswith("conv3d.weight"):
            state[key] = torch.randn(shape, generator=g) * math.sqrt(2 / shape[1:].numel())
        elif key.endswith(("running_var", "bn.weight")):
            state[key] = torch.rand(shape, generator=g) + 0.5
        else:
            state[key] = 0.1 * torch.randn(shape, generator=g)
    return state


@pytest.fixture(scope="module")
def clips() -> torch.Tensor:
    """Long enough for two steps at the end, which are averaged; 17 and 9 leave odd rests to pad."""
    return torch.rand(1, 3, 17, 224, 224, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.fixture(scope="module")
def file(state, tmp_path_factory) -> Path:
    """As `rgb_imagenet.pt` and `i3d_pretrained_400.pt` are written."""
    path = tmp_path_factory.mktemp("weights") / "i3d.pt"
    torch.save(state, path)
    return path


@pytest.fixture(scope="module")
def features(file, clips) -> torch.Tensor:
    with torch.no_grad():
        return load_i3d(file)(clips)


# --- the network ----------------------------------------------------------------------------------------------------


def reference(state: State, x: torch.Tensor, eps: float = 1e-3) -> torch.Tensor:
    """I3D once more, from the paper's figure 3 and TensorFlow's definition of "SAME"."""

    def same(x: torch.Tensor, kernel: tuple, stride: tuple, value: float) -> torch.Tensor:
        pads = []
        for n, k, s in zip(x.shape[:1:-1], kernel[::-1], stride[::-1], strict=True):
            total = max((math.ceil(n / s) - 1) * s + k - n, 0)
            pads += [total // 2, total - total // 2]
        return F.pad(x, pads, value=value)

    def conv(name: str, x: torch.Tensor, stride: int = 1) -> torch.Tensor:
        weight = state[f"{name}.conv3d.weight"]
        x = F.conv3d(same(x, weight.shape[2:], (stride,) * 3, 0.0), weight, stride=stride)
        mean, var, gain, bias = (
            state[f"{name}.bn.{key}"].view(-1, 1, 1, 1) for key in ("running_mean", "running_var", "weight", "bias")
        )
        return torch.relu((x - mean) / torch.sqrt(var + eps) * gain + bias)

    def pool(x: torch.Tensor, kernel: tuple, stride: tuple) -> torch.Tensor:
        return F.max_pool3d(same(x, kernel, stride, -math.inf), kernel, stride)

    def mixed(name: str, x: torch.Tensor) -> torch.Tensor:
        branches = [
            conv(f"{name}.b0", x),
            conv(f"{name}.b1b", conv(f"{name}.b1a", x)),
            conv(f"{name}.b2b", conv(f"{name}.b2a", x)),
            conv(f"{name}.b3b", pool(x, (3, 3, 3), (1, 1, 1))),
        ]
        return torch.cat(branches, dim=1)

    x = pool(conv("Conv3d_1a_7x7", x, stride=2), (1, 3, 3), (1, 2, 2))
    x = pool(conv("Conv3d_2c_3x3", conv("Conv3d_2b_1x1", x)), (1, 3, 3), (1, 2, 2))
    x = pool(mixed("Mixed_3c", mixed("Mixed_3b", x)), (3, 3, 3), (2, 2, 2))
    for name in "bcdef":
        x = mixed(f"Mixed_4{name}", x)
    x = mixed("Mixed_5c", mixed("Mixed_5b", pool(x, (2, 2, 2), (2, 2, 2))))
    x = (x[:, :, 1:] + x[:, :, :-1]).mean(dim=(3, 4)) / 2  # pairs of steps, all places
    logits = torch.einsum("bct,kc->bkt", x, state["logits.conv3d.weight"].flatten(1))
    return (logits + state["logits.conv3d.bias"][:, None]).mean(dim=2)


def test_agrees_with_a_second_implementation(state, features, clips):
    assert features.std() > 0.1
    torch.testing.assert_close(features, reference(state, clips), rtol=1e-4, atol=1e-4)


def test_the_size_of_the_published_network():
    with torch.device("meta"):
        network = I3D()
    assert sum(parameter.numel() for parameter in network.parameters()) == 12_697_264
    assert sum(key.endswith("running_mean") for key in network.state_dict()) == 57  # that many lack a counter in them
    # Table 1 of Szegedy et al. (2015): the outputs of 3a to 5b.
    outputs = [widths[0] + widths[2] + widths[4] + widths[5] for widths in MIXED.values()]
    assert outputs == [256, 480, 512, 512, 512, 528, 832, 832, 1024]


def test_it_stays_frozen_and_in_evaluation_mode(file):
    network = load_i3d(file).train()
    assert not network.training and not network.Mixed_3b.b0.bn.training
    assert not any(parameter.requires_grad for parameter in network.parameters())


@pytest.mark.parametrize("shape", [(3, 9, 224, 224), (1, 3, 8, 224, 224), (1, 1, 9, 224, 224), (1, 3, 9, 112, 224)])
def test_other_shapes_are_refused(shape):
    with torch.device("meta"):
        network, clips = I3D(), torch.zeros(shape)
    with pytest.raises(ValueError, match="I3D needs clips"):
        network(clips)


# --- files of weights -----------------------------------------------------------------------------------------------


def as_kinetics_i3d_pytorch(state: State) -> State:
    """The keys of hassony2/kinetics_i3d_pytorch."""
    names = {"b0": "branch_0", "b1a": "branch_1.0", "b1b": "branch_1.1", "b2a": "branch_2.0", "b2b": "branch_2.1"}
    names |= {"b3b": "branch_3.1", "bn": "batch3d", "logits": "conv3d_0c_1x1"}

    def renamed(key: str) -> str:
        return ".".join(names.get(part, part[0].lower() + part[1:]) for part in key.split("."))

    return {renamed(key): tensor for key, tensor in state.items()}


def with_counters(state: State) -> State:
    counters = {key.replace("running_mean", "num_batches_tracked"): key for key in state if "running_mean" in key}
    return state | {key: torch.tensor(7) for key in counters}


def in_each_layout(state: State, folder: Path) -> dict[str, Path]:
    files = {
        name: folder / name for name in ("counters.pt", "kinetics.pth", "kinetics_counters.pt", "ours.safetensors")
    }
    torch.save(with_counters(state), files["counters.pt"])
    torch.save(as_kinetics_i3d_pytorch(state), files["kinetics.pth"], _use_new_zipfile_serialization=False)
    torch.save(as_kinetics_i3d_pytorch(with_counters(state)), files["kinetics_counters.pt"])
    save_file(state, files["ours.safetensors"])
    return files


def test_every_layout_gives_equal_features(state, file, features, clips, tmp_path):
    files = in_each_layout(state, tmp_path)
    first = load_i3d(file).state_dict()
    for path in files.values():
        loaded = load_i3d(path)
        for key, tensor in loaded.state_dict().items():
            assert tensor.device.type == "cpu" and torch.equal(tensor, first[key]), (path, key)
    torch.testing.assert_close(load_i3d(files["kinetics.pth"])(clips), features, rtol=0, atol=1e-4)


def test_the_names_of_kinetics_i3d_pytorch(state):
    keys = as_kinetics_i3d_pytorch(state)
    for key in (
        "conv3d_1a_7x7.batch3d.weight",
        "mixed_5b.branch_1.0.conv3d.weight",
        "mixed_3b.branch_0.conv3d.weight",
    ):
        assert key in keys  # as its users print them
    assert "conv3d_0c_1x1.conv3d.bias" in keys


def test_half_precision_files_are_computed_in_full(state, tmp_path):
    torch.save({key: tensor.half() for key, tensor in state.items()}, tmp_path / "half.pt")
    loaded = load_i3d(tmp_path / "half.pt")
    assert {tensor.dtype for tensor in loaded.parameters()} == {torch.float32}


def test_loading_draws_no_random_numbers(file):
    before = torch.get_rng_state()
    load_i3d(file)
    assert torch.equal(torch.get_rng_state(), before)


def test_wrong_files_are_named_and_never_half_loaded(state, tmp_path):
    path = tmp_path / "wrong.pt"

    def refused(content: object, *said: str) -> None:
        torch.save(content, path)
        with pytest.raises(UserError) as error:
            load_i3d(path)
        for words in (str(path), *said):
            assert words in str(error.value)
        assert str(error.value).count(". ") == 0  # one sentence

    def without(*keys: str) -> State:
        return {key: tensor for key, tensor in state.items() if key not in keys}

    last = "Mixed_5c.b3b.bn.running_var"
    refused(without(last), f"1 of its keys are missing ({last})")
    refused(state | {"extra.weight": torch.zeros(1)}, "1 of its keys are unexpected (extra.weight)")
    refused(without(last) | {"a": torch.zeros(1)}, "1 of its keys are missing", "and 1 of its keys are unexpected (a)")
    refused({"features.0.weight": torch.zeros(1)}, "missing (Conv3d_1a_7x7.conv3d.weight, ", ", ...)")
    flow = state | {"Conv3d_1a_7x7.conv3d.weight": torch.zeros(64, 2, 7, 7, 7)}
    refused(flow, "Conv3d_1a_7x7.conv3d.weight is float32 (64, 2, 7, 7, 7), not float (64, 3, 7, 7, 7)")
    k600 = state | {"logits.conv3d.weight": torch.zeros(600, 1024, 1, 1, 1), "logits.conv3d.bias": torch.zeros(600)}
    refused(k600, "logits.conv3d.weight is float32 (600, 1024, 1, 1, 1)")
    refused(state | {"logits.conv3d.bias": torch.zeros(400, dtype=torch.int64)}, "logits.conv3d.bias is int64 (400,)")
    refused({"state_dict": state}, "other things than tensors")
    refused({"path": Path("anything")}, "cannot be read")
    path.write_text("not weights")
    with pytest.raises(UserError, match="cannot be read"):
        load_i3d(path)


def test_detectors_load_it_with_the_epsilon_of_their_projects(file):
    with pytest.raises(UserError, match="--detector-sha256"):
        get_detector("i3d_imagenet", file)  # not the published file
    imagenet = get_detector("i3d_imagenet", file, file_sha256(file))
    videogpt = get_detector("i3d", file)  # nobody published its hash
    assert videogpt.sha256 == imagenet.sha256 == file_sha256(file)
    for detector, eps in ((imagenet, 1e-3), (videogpt, 1e-5)):
        norms = [layer for layer in detector.modules() if isinstance(layer, torch.nn.BatchNorm3d)]
        assert len(norms) == 57 and {norm.eps for norm in norms} == {eps}
        assert not detector.train().network.training
