"""How much of the DiT's conditioning vector its blocks see."""

import pytest
import torch

from pipelines import VidTwinTransformer3DModel
from vidgen.training.saturation import MAX_CLASSES, describe_saturation, measure_saturation


@pytest.mark.parametrize("num_classes", [0, 3, 2 * MAX_CLASSES])
def test_a_new_model_sees_all_and_a_driven_one_nothing(num_classes):
    torch.manual_seed(0)
    model = VidTwinTransformer3DModel.from_preset("tiny-test", num_classes=num_classes)
    assert measure_saturation(model, 1000) == 0.0
    with torch.no_grad():
        model.condition_embed.stream_embed[0] -= 100.0  # all of structure, nothing of dynamics
    assert measure_saturation(model, 1000) == 0.5


def test_one_dead_class_of_many_counts_as_one():
    model = VidTwinTransformer3DModel.from_preset("tiny-test", num_classes=4)
    with torch.no_grad():
        model.condition_embed.class_embed.weight[2] -= 100.0
    assert measure_saturation(model, 1000) == pytest.approx(1 / 5)


def test_only_a_lost_vector_is_warned_of():
    assert describe_saturation(0.5) is None
    assert describe_saturation(0.99).startswith("99% of the vector of timestep and class is below -4")
