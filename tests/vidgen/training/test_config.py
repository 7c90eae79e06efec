"""Configs and overrides: the values they accept, and one sentence for each mistake."""

from __future__ import annotations

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from vidgen.common.config import config_fields, load_config, parse_values, save_config
from vidgen.common.errors import UserError
from vidgen.training.config import DiTTrainingConfig, VAETrainingConfig

CONFIGS = Path(__file__).parents[3] / "configs"


def test_overrides_have_priority_over_the_file(tmp_path):
    file = tmp_path / "file.yaml"
    file.write_text("train:\n  max_train_steps: 5\n  train_batch_size: 3\nmodel:\n  overrides: {hidden_size: 64}\n")
    arguments = ["train.max_train_steps=7", "--config", str(file), "data.root=clips", "model.overrides.num_frames=8"]
    config = load_config(VAETrainingConfig, arguments)
    assert config.train.max_train_steps == 7
    assert config.train.train_batch_size == 3
    assert config.model.overrides == {"hidden_size": 64, "num_frames": 8}
    assert config.optim.learning_rate == 1.6e-4


def test_values_of_a_command_line_option():
    values = parse_values(
        ["scale=3", "stop=0.5", "layers=[0, 1]", "skip.ff=false", "name=a=b", "none=null"], "--options"
    )
    expected = {"scale": 3, "stop": 0.5, "layers": [0, 1], "skip": {"ff": False}, "name": "a=b", "none": None}
    assert values == expected and parse_values([], "--options") == {}
    for argument, message in (
        ("stop", "--options takes key=value, not 'stop'"),
        ("layers=[0", "not a readable value"),
        ("scale=${secret}", "not a readable value"),
    ):
        with pytest.raises(UserError, match=message):
            parse_values([argument], "--options")


def test_a_saved_config_reads_back(tmp_path):
    config = load_config(DiTTrainingConfig, ["vae=v", "data.root=d", "model.overrides.structure_patch_size=[8,1,1]"])
    save_config(config, tmp_path / "config.yaml")
    assert load_config(DiTTrainingConfig, ["--config", str(tmp_path / "config.yaml")]) == config


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("vae/*.yaml")) + sorted(CONFIGS.glob("dit/*.yaml")), ids=str)
def test_every_config_is_valid(path):
    kind, needed = (VAETrainingConfig, []) if path.parent.name == "vae" else (DiTTrainingConfig, ["vae=v"])
    assert load_config(kind, ["--config", str(path), "data.root=clips", *needed]).data.root == "clips"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*/*.yaml")), ids=str)
def test_every_header_states_command_hardware_time_and_score(path):
    header = path.read_text().split("\n\n")[0]
    assert all(f"# {word}:" in header for word in ("Command", "Hardware", "Time", "Score"))


@pytest.mark.parametrize(
    ("argument", "nearest"),
    [
        ("train.max_train_step=3", "train.max_train_steps"),
        ("max_train_steps=3", "train.max_train_steps"),
        ("optim.lr=3", "optim"),
        ("lerning_rate=3", "optim.learning_rate"),
        ("data.rot=x", "data.root"),
        ("trian.seed=1", "seed"),
    ],
)
def test_an_unknown_key_names_the_nearest(argument, nearest):
    with pytest.raises(UserError, match=f"Unknown key '{argument.split('=')[0]}'.*did you mean '{nearest}"):
        load_config(VAETrainingConfig, ["data.root=x", argument])


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "data.root is not set"),
        (["data.root=x", "train.max_train_steps=many"], "train.max_train_steps in the command line does not fit"),
        (["data.root=x", "train=3"], "does not fit"),
        (["data.root=x", "--config"], "--config requires a path"),
        (["data.root=x", "--config", "absent.yaml"], "No config at absent.yaml"),
        (["data.root"], "is not an override"),
        (["--help-me"], "is not an override"),
        (["data.root=x", "train.train_batch_size=0"], "train.train_batch_size must be 1 or more, not 0"),
        (["data.root=x", "train.logging_steps=0"], "train.logging_steps must be 1 or more, not 0"),
        (["data.root=x", "gan.start_step=-1"], "gan.start_step must be 0 or more, not -1"),
        (["data.root=x", "train.ema_decay=2"], "train.ema_decay must be 1 or less, not 2"),
    ],
)
def test_mistakes_get_one_sentence(arguments, sentence):
    with pytest.raises(UserError) as caught:
        load_config(VAETrainingConfig, arguments)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("argument", "key"),
    [
        ("data.fps=nan", "data.fps"),
        ("data.fps=.inf", "data.fps"),
        ("optim.learning_rate=1e999", "optim.learning_rate"),
        ("train.ema_decay=nan", "train.ema_decay"),
        ("model.overrides.mlp_ratio=.nan", "model.overrides.mlp_ratio"),
        ("model.overrides.list=[1.0,-.inf]", "model.overrides.list.1"),
    ],
)
def test_numbers_must_be_finite(argument, key):
    with pytest.raises(UserError, match=rf"^{key} must be a finite number, not (nan|inf|-inf)\.$"):
        load_config(VAETrainingConfig, ["data.root=x", argument])


def test_every_number_must_be_finite():
    keys = config_fields(VAETrainingConfig) | config_fields(DiTTrainingConfig)
    for key in (key for key, f in keys.items() if f.type == "float"):
        config_class = VAETrainingConfig if key in config_fields(VAETrainingConfig) else DiTTrainingConfig
        with pytest.raises(UserError, match=f"^{key} must be a finite number"):
            load_config(config_class, ["data.root=x", *["vae=v"][: config_class is DiTTrainingConfig], f"{key}=nan"])


def test_home_folders_are_expanded_in_every_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    keys = {
        VAETrainingConfig: ["data.root", "data.validation_root", "data.split_files", "output_dir", "resume"],
        DiTTrainingConfig: ["data.root", "output_dir", "vae", "latent_cache"],
    }
    keys[VAETrainingConfig].append("perceptual.weights")
    for config_class, paths in keys.items():
        file = OmegaConf.create()
        for key in paths:
            OmegaConf.update(file, key, f"~/{key}")
        OmegaConf.save(file, tmp_path / "file.yaml")
        for arguments in (["--config", "~/file.yaml"], [f"{key}=~/{key}" for key in paths]):
            config = OmegaConf.structured(load_config(config_class, arguments))
            assert {key: OmegaConf.select(config, key) for key in paths} == {key: f"{tmp_path}/{key}" for key in paths}
    assert VAETrainingConfig(output_dir="~/a").output_dir == f"{tmp_path}/a"


def test_an_empty_path_is_not_the_current_folder(tmp_path):
    (tmp_path / "file.yaml").write_text("data: {root: ''}")
    with pytest.raises(UserError, match=r"data\.root is empty"):
        load_config(VAETrainingConfig, ["--config", str(tmp_path / "file.yaml")])


def test_every_whole_number_has_a_minimum():
    known = config_fields(VAETrainingConfig) | config_fields(DiTTrainingConfig)
    numbers = {key: f.metadata for key, f in known.items() if f.type in ("int", "int | None")}
    assert not [key for key, limits in numbers.items() if limits["minimum"] is None and not limits["choices"]]


def test_text_stays_as_it_was_typed(tmp_path):
    config = load_config(VAETrainingConfig, ["data.root=007", "train.mixed_precision=no", "data.validation_root=null"])
    assert (config.data.root, config.train.mixed_precision, config.data.validation_root) == ("007", "no", None)
    file = tmp_path / "file.yaml"
    file.write_text("train:\n  mixed_precision: no\ndata:\n  root: 12\n")
    config = load_config(VAETrainingConfig, ["--config", str(file)])
    assert (config.data.root, config.train.mixed_precision) == ("12", "no")


@pytest.mark.parametrize("content", ["a: [1", "- 1\n- 2\n", ""])
def test_a_broken_file_is_named(tmp_path, content):
    file = tmp_path / "broken.yaml"
    file.write_text(content)
    if not content:
        load_config(VAETrainingConfig, ["--config", str(file), "data.root=x"])
        return
    with pytest.raises(UserError, match=r"broken\.yaml"):
        load_config(VAETrainingConfig, ["--config", str(file), "data.root=x"])
