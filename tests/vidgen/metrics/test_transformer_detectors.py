"""V-JEPA 2, VideoMAE and CLIP with tiny random weights; sizes of the published configs."""

import json

import pytest
import torch
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    VideoMAEConfig,
    VideoMAEModel,
    VJEPA2Config,
    VJEPA2ForVideoClassification,
    VJEPA2Model,
)

from vidgen.common.errors import UserError
from vidgen.common.weights import file_sha256
from vidgen.metrics.detectors import get_detector
from vidgen.metrics.transformer_detectors import CLIP, VJEPA2, VideoMAE

LAYERS = dict(num_hidden_layers=1, num_attention_heads=2)
JEPA = VJEPA2Config(
    hidden_size=24, crop_size=16, patch_size=8, frames_per_clip=4, pred_hidden_size=24, pred_num_attention_heads=2,
    pred_num_hidden_layers=1, num_pooler_layers=1, **LAYERS,
)  # fmt: skip
MODELS = {
    "vjepa2": (VJEPA2Model, JEPA, 24),
    "videomae": (
        VideoMAEModel,
        VideoMAEConfig(image_size=16, patch_size=8, num_frames=4, hidden_size=16, intermediate_size=16, **LAYERS),
        16,
    ),
    "clip": (
        CLIPVisionModelWithProjection,
        CLIPVisionConfig(
            image_size=16, patch_size=8, hidden_size=16, intermediate_size=16, projection_dim=6, **LAYERS
        ),
        6,
    ),
}
CLIPS = torch.rand(2, 3, 4, 20, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture(params=MODELS)
def saved(request, tmp_path):
    """The name of a detector, and the folder of its model."""
    model_class, config, _ = MODELS[request.param]
    torch.manual_seed(0)
    model_class(config).save_pretrained(tmp_path)
    return request.param, tmp_path


def test_features_have_the_configs_size_and_the_hash_of_the_file(saved):
    name, folder = saved
    detector = get_detector(name, folder)
    features = detector(CLIPS)
    assert features.shape == (2, MODELS[name][2]) == (2, detector.dim) and features.isfinite().all()
    torch.testing.assert_close(detector(CLIPS[1:]), features[1:], rtol=1e-4, atol=1e-5)
    assert (features[0] - features[1]).abs().max() > 1e-4
    details = json.loads(json.dumps(detector.describe()))
    assert details["sha256"] == file_sha256(folder / "model.safetensors") and details["parameters"] > 0
    assert "squashed to 16 x 16" in details["preprocessing"]
    with pytest.raises(UserError, match="not 00, which --detector-sha256"):
        get_detector(name, folder, "00")


def test_colors_are_those_of_the_preprocessor_config(saved):
    name, folder = saved
    (folder / "preprocessor_config.json").write_text('{"image_mean": [0, 0, 0], "image_std": [2, 2, 2]}')
    inputs = get_detector(name, folder)._prepare(CLIPS[..., :16, :16])
    torch.testing.assert_close(inputs, (CLIPS[..., :16, :16] + 1) / 4)


def test_unusable_models_are_refused(saved):
    name, folder = saved
    with pytest.raises(UserError, match=f"pass --detector {name}=FOLDER"):
        get_detector(name)
    other = "clip" if name != "clip" else "vjepa2"
    with pytest.raises(UserError, match=f"the detector {other} needs"):
        get_detector(other, folder)
    with pytest.raises(UserError, match="is no folder"):
        get_detector(name, folder / "absent")
    if name != "clip":
        with pytest.raises(UserError, match=r"needs clips of 4 frames|needs a multiple of 2 frames"):
            get_detector(name, folder)(CLIPS[:, :, :3])
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="no weights in safetensors"):
        get_detector(name, folder)


def test_a_finetuned_vjepa2_gives_its_pooled_features(tmp_path):
    model = VJEPA2ForVideoClassification(JEPA)
    model.save_pretrained(tmp_path)
    detector = get_detector("vjepa2", tmp_path)
    model.eval()
    tokens = model.vjepa2.encoder(pixel_values_videos=detector._prepare(CLIPS).transpose(1, 2)).last_hidden_state
    torch.testing.assert_close(detector(CLIPS), model.pooler(tokens).detach(), rtol=1e-4, atol=1e-5)


def test_missing_tensors_are_named(tmp_path):
    VideoMAEModel(MODELS["videomae"][1]).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    with pytest.raises(UserError, match=r"lack \d+ tensors, the first encoder"):
        get_detector("videomae", tmp_path)


def test_published_sizes_are_read_from_the_config():
    assert VJEPA2.read_sizes(VJEPA2Config()) == (1024, 256)  # facebook/vjepa2-vitl-fpc64-256
    assert VJEPA2.read_sizes(VJEPA2Config(hidden_size=1408, crop_size=384)) == (1408, 384)  # vitg-fpc64-384
    assert VideoMAE.read_sizes(VideoMAEConfig()) == (768, 224)  # MCG-NJU/videomae-base
    assert CLIP.read_sizes(CLIPVisionConfig(projection_dim=768, image_size=224)) == (768, 224)
