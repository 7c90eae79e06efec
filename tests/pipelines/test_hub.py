"""Upload to and download from the Hub, with huggingface_hub's client and a local fake Hub.

`online` and `offline` (in conftest.py) run the functions of this module in separate processes.
"""

from __future__ import annotations

import json
import os
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.guiders import ClassifierFreeGuidance
from hub_server import TOKEN
from peers import tiny_peer
from safetensors.torch import save
from tiny_text import tiny_text_encoder

from autoencoder import AutoencoderKLVidTwin
from autoencoder.adapters import adapt
from pipelines import VidTwinPipeline, VidTwinTransformer3DModel, default_scheduler
from vidgen.common.loading import load_vae, weights_hash

CLASSES = {"vae": AutoencoderKLVidTwin, "transformer": VidTwinTransformer3DModel, "pipeline": VidTwinPipeline}
NEEDED = [
    "model_index.json",
    "scheduler/scheduler_config.json",
    "transformer/config.json",
    "transformer/diffusion_pytorch_model.safetensors",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
]
LABELS = {0: "Biking", 1: "Diving", 2: "Yo Yo"}
INDEX = "diffusion_pytorch_model.safetensors.index.json"


# --- functions of a client ------------------------------------------------------------------------------------------


def sample(pipe, prompt: str | None = None) -> np.ndarray:
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    options = {"num_inference_steps": 2, "generator": generator, "output_type": "pt"}
    return pipe("Diving", prompt=prompt, **options).frames.numpy()


def load(repo_id: str, prompt: str | None = None, **options) -> np.ndarray:
    return sample(VidTwinPipeline.from_pretrained(repo_id, **options), prompt)


def load_with_own_vae(repo_id: str, vae: str, **options) -> np.ndarray:
    own = AutoencoderKLVidTwin.from_pretrained(vae)
    pipe = VidTwinPipeline.from_pretrained(repo_id, vae=own, **options)
    assert pipe.vae is own
    return sample(pipe)


def load_model(kind: str, *args, **options) -> dict[str, np.ndarray]:
    return {
        name: value.numpy() for name, value in CLASSES[kind].from_pretrained(*args, **options).state_dict().items()
    }


def load_peer(name: str) -> str:
    return weights_hash(load_vae(name))


def push(kind: str, folder: Path, repo_id: str, variant: str | None = None, **options) -> None:
    CLASSES[kind].from_pretrained(folder, **options).push_to_hub(repo_id, variant=variant)


def push_in_shards(folder: Path, repo_id: str, saved: str) -> None:
    pipe = VidTwinPipeline.from_pretrained(folder)
    pipe.save_pretrained(saved, max_shard_size="200KB", push_to_hub=True, repo_id=repo_id)


def run_script(code: str, folder: Path) -> list[str]:
    os.chdir(folder)
    exec(code, {})
    return os.listdir(folder)


def load_file_of_hub(address: str, **options) -> dict[str, np.ndarray]:
    model = AutoencoderKLVidTwin.from_single_file(address, **options)
    return {name: value.numpy() for name, value in model.state_dict().items()}


def load_lora(folder: Path, repo_id: str, **options) -> np.ndarray:
    pipe = VidTwinPipeline.from_pretrained(folder)
    pipe.load_lora_weights(repo_id, **options)
    return sample(pipe)


# --- published models -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def make_folder(vae, make_transformer, tmp_path_factory):
    """A saved pipeline; its weights differ by `scale`."""

    def make(scale: float = 1.0) -> Path:
        transformer = make_transformer()
        with torch.no_grad():
            transformer.structure_out.weight *= scale
        folder = tmp_path_factory.mktemp("saved")
        VidTwinPipeline(vae, transformer, default_scheduler(), id2label=LABELS).save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="module")
def folder(make_folder) -> Path:
    return make_folder()


@pytest.fixture(scope="module")
def other_folder(make_folder) -> Path:
    return make_folder(scale=-1.0)


@pytest.fixture(scope="module")
def expected(folder) -> np.ndarray:
    return load(folder)


@pytest.fixture(scope="module")
def other_expected(other_folder, expected) -> np.ndarray:
    other = load(other_folder)
    assert not np.array_equal(other, expected)
    return other


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def files(folder) -> dict[str, bytes]:
    return files_of(folder)


@pytest.fixture
def published(hub, files):
    return hub.create("user/published", files)


# --- to the Hub and back -------------------------------------------------------------------------------------------


def test_a_pushed_pipeline_loads_bit_equal(online, hub, folder, files, expected, cache):
    online(push, "pipeline", folder, "user/pushed")
    assert set(hub.repos["user/pushed"].files) == {".gitattributes", "README.md", *files}

    hub.requests.clear()
    assert np.array_equal(online(load, "user/pushed", cache_dir=cache), expected)
    assert hub.fetched() == set(NEEDED)

    hub.requests.clear()
    assert np.array_equal(online(load, "user/pushed", cache_dir=cache), expected)
    assert not hub.fetched()


@pytest.mark.parametrize("kind", ["vae", "transformer"])
def test_a_pushed_model_loads_bit_equal(online, folder, cache, kind):
    online(push, kind, folder / kind, f"user/{kind}")
    mine = load_model(kind, folder / kind)
    for back in (
        online(load_model, kind, f"user/{kind}", cache_dir=cache),
        online(load_model, kind, f"user/{kind}", cache_dir=cache, local_files_only=True),
    ):
        assert back.keys() == mine.keys()
        assert all(np.array_equal(back[name], mine[name]) for name in mine)


@pytest.mark.parametrize("kind", ["vae", "transformer"])
def test_a_component_loads_alone(online, published, hub, folder, cache, kind):
    back = online(load_model, kind, "user/published", subfolder=kind, cache_dir=cache)
    mine = load_model(kind, folder / kind)
    assert all(np.array_equal(back[name], mine[name]) for name in mine)
    assert {path.split("/")[0] for path in hub.fetched()} == {kind}


def test_a_passed_vae_is_used_and_none_downloaded(online, published, hub, folder, expected, cache):
    assert np.array_equal(online(load_with_own_vae, "user/published", folder / "vae", cache_dir=cache), expected)
    assert not [path for path in hub.fetched() if path.startswith("vae")]


@pytest.mark.parametrize("name", ["AutoencoderKLWan", "Emu3VQVAE"])
def test_a_pipeline_with_another_autoencoder(online, hub, cache, tmp_path, name):
    peer = tiny_peer(name)
    autoencoder = adapt(peer, num_frames=4 if name == "Emu3VQVAE" else 5, height=16, width=16)
    transformer = VidTwinTransformer3DModel.from_preset("tiny-test", autoencoder, num_classes=1)
    VidTwinPipeline(peer, transformer, default_scheduler(), {0: "Diving"}).save_pretrained(tmp_path)
    hub.create(f"user/{name}", files_of(tmp_path))
    assert np.array_equal(online(load, f"user/{name}", cache_dir=cache), load(tmp_path))
    assert online(load_peer, f"user/{name}") == online(load_peer, str(tmp_path)) == weights_hash(peer)


def test_a_pipeline_with_a_text_encoder_and_a_guider(online, hub, vae, make_transformer, cache, tmp_path):
    encoder = tiny_text_encoder()
    parts = {"text_encoder": encoder.model, "tokenizer": encoder.tokenizer, "guider": ClassifierFreeGuidance(3.0)}
    pipe = VidTwinPipeline(vae, make_transformer(caption_channels=16), default_scheduler(), id2label=LABELS, **parts)
    pipe.save_pretrained(tmp_path / "text")
    hub.create("me/text", {**files_of(tmp_path / "text"), "text_encoder/pytorch_model.bin": b"a pickle"})
    loaded = online(load, "me/text", cache_dir=cache, prompt="a red disc")
    assert np.array_equal(loaded, sample(pipe, prompt="a red disc"))
    assert not list(Path(cache).rglob("*.bin"))


def test_shards(online, hub, folder, expected, cache, tmp_path):
    online(push_in_shards, folder, "user/shards", str(tmp_path / "shards"))
    shards = [path for path in hub.repos["user/shards"].files if "-of-" in path]
    assert len(shards) >= 4
    assert np.array_equal(online(load, "user/shards", cache_dir=cache), expected)
    assert np.array_equal(online(load, "user/shards", cache_dir=cache, local_files_only=True), expected)

    hub.repos["user/shards"].commit({shards[0]: None})
    with pytest.raises(OSError, match=Path(shards[0]).name):
        online(load, "user/shards", cache_dir=cache)


def test_variants(online, hub, folder, other_folder, expected, other_expected, cache):
    online(push, "pipeline", folder, "user/variants")
    online(push, "pipeline", other_folder, "user/variants", variant="ema")
    plain, variant = (f"transformer/diffusion_pytorch_model{ending}.safetensors" for ending in ("", ".ema"))

    assert np.array_equal(online(load, "user/variants", cache_dir=cache), expected)
    assert variant not in hub.fetched()
    hub.requests.clear()
    assert np.array_equal(online(load, "user/variants", variant="ema", cache_dir=cache), other_expected)
    assert variant in hub.fetched() and plain not in hub.fetched()
    with pytest.raises(ValueError, match="variant=fp16"):
        online(load, "user/variants", variant="fp16", cache_dir=cache)


def test_a_variant_of_one_component(online, offline, hub, files, other_folder, other_expected, cache):
    variant = (other_folder / "transformer" / "diffusion_pytorch_model.safetensors").read_bytes()
    hub.create("user/mixed", {**files, "transformer/diffusion_pytorch_model.ema.safetensors": variant})
    assert np.array_equal(online(load, "user/mixed", variant="ema", cache_dir=cache), other_expected)
    assert np.array_equal(offline(load, "user/mixed", variant="ema", cache_dir=cache), other_expected)

    with pytest.raises(FileNotFoundError, match=r"user/mixed .*transformer/diffusion_pytorch_model\.safetensors"):
        offline(load, "user/mixed", cache_dir=cache)


# --- single files and LoRA -----------------------------------------------------------------------------------------


GOLDEN = Path(__file__).parents[1] / "data" / "official_golden"
HEADS = {"num_attention_heads": 4, "qformer_heads": 4}


@pytest.mark.parametrize("place", ["user/official", "{hub}/user/official/blob/main", "hf.co/user/official/resolve/v2"])
def test_a_single_file_by_its_address(online, hub, cache, place):
    weights = (GOLDEN / "mini_weights.safetensors").read_bytes()
    repo = hub.create("user/official")
    repo.commit({"a b/mini.safetensors": weights}, branch="v2" if place.endswith("v2") else "main")
    address = f"{place.format(hub=hub.url)}/a{'%20' if '://' in place else ' '}b/mini.safetensors?download=true"
    address = address if "://" in place else address.removesuffix("?download=true")
    expected = load_file_of_hub(GOLDEN / "mini_weights.safetensors", **HEADS)
    for options in ({}, {"local_files_only": True}):
        back = online(load_file_of_hub, address, cache_dir=cache, **options, **HEADS)
        assert all(np.array_equal(back[name], expected[name]) for name in expected)
    assert hub.fetched() == {"a b/mini.safetensors"}


def test_a_single_file_with_the_config_of_a_repository(online, hub, published, files, cache):
    """The config is that of the pipeline's `vae`; `subfolder` and `revision` are obeyed."""
    weights = files["vae/diffusion_pytorch_model.safetensors"]
    hub.create("user/loose", {}).commit({"x/model.safetensors": weights}, branch="v2")
    options = {"revision": "v2", "cache_dir": cache}
    back = [
        online(load_file_of_hub, "user/loose/x/model.safetensors", config="user/published", **options),
        online(
            load_file_of_hub, "user/loose/x/model.safetensors", config="user/published", subfolder="vae", **options
        ),
    ]
    assert back[0].keys() == back[1].keys()
    assert all(np.array_equal(back[0][name], back[1][name]) for name in back[0])
    with pytest.raises(OSError, match="user/loose has no revision 'v3'"):
        online(load_file_of_hub, f"{hub.url}/user/loose/blob/v3/x/model.safetensors", cache_dir=cache)
    with pytest.raises(FileNotFoundError, match=r"user/loose has no file y/model\.safetensors"):
        online(load_file_of_hub, "user/loose/model.safetensors", subfolder="y", **options)


def test_a_missing_single_file(online, offline, hub, cache):
    for client, reason in (
        (online, "neither a local folder nor a repository"),
        (offline, "load it once with a connection"),
    ):
        with pytest.raises(OSError, match=f"No checkpoint file at runs/x/model.ckpt, and none on the Hub: .*{reason}"):
            client(load_file_of_hub, "runs/x/model.ckpt", cache_dir=cache)
    hub.requests.clear()
    for address in ("./runs/x/model.ckpt", "https://example.org/u/r/blob/main/model.ckpt", "u/r/model.gguf"):
        with pytest.raises(FileNotFoundError, match=r"No checkpoint file at .* A file on the Hub is given as"):
            online(load_file_of_hub, address, cache_dir=cache)
    assert not hub.requests


@pytest.mark.parametrize("name", ["pytorch_lora_weights", "style"])
def test_a_lora_of_a_repository(online, hub, folder, expected, cache, name):
    layer = "transformer.transformer_blocks.0.attn1.to_out"
    dim = VidTwinTransformer3DModel.from_pretrained(folder / "transformer").structure_embed.proj.out_features
    weights = {f"{layer}.0.lora_A.weight": torch.ones(2, dim), f"{layer}.0.lora_B.weight": torch.ones(dim, 2)}
    repo = hub.create("user/lora", {f"{name}.safetensors": save(weights), "x.bin": b"", "sub/x.safetensors": b""})
    made = online(load_lora, folder, "user/lora", cache_dir=cache)
    assert not np.allclose(made, expected, atol=1e-3)
    assert {path for path in hub.fetched() if "." in path and path[-5:] != ".json"} >= {f"{name}.safetensors"}
    assert "x.bin" not in hub.fetched()
    named = {"weight_name": f"{name}.safetensors", "cache_dir": cache, "local_files_only": True}
    assert np.array_equal(online(load_lora, folder, "user/lora", **named), made)
    with pytest.raises(FileNotFoundError, match=r"user/lora has no other\.safetensors, the weights of a LoRA"):
        online(load_lora, folder, "user/lora", weight_name="other.safetensors", cache_dir=cache)
    repo.commit({"pytorch_lora_weights.safetensors": None, "a.safetensors": b"", "b.safetensors": b""})
    with pytest.raises(ValueError, match=r"user/lora has a\.safetensors, b\.safetensors.*pass weight_name="):
        online(load_lora, folder, "user/lora", cache_dir=cache)


# --- revisions, names and rights -----------------------------------------------------------------------------------


def test_revisions(online, hub, published, other_folder, expected, other_expected, cache):
    sha = published.commit(files_of(other_folder), branch="v2")
    assert np.array_equal(online(load, "user/published", cache_dir=cache), expected)
    assert np.array_equal(online(load, "user/published", revision="v2", cache_dir=cache), other_expected)
    assert np.array_equal(online(load, "user/published", revision=sha, cache_dir=cache), other_expected)
    with pytest.raises(
        OSError, match="user/published has no revision 'v3': pass a branch, a tag or a commit"
    ) as raised:
        online(load, "user/published", revision="v3", cache_dir=cache)
    assert "\n" not in str(raised.value)


def test_a_new_commit_is_downloaded(online, published, other_folder, expected, other_expected, cache):
    assert np.array_equal(online(load, "user/published", cache_dir=cache), expected)
    published.commit(files_of(other_folder))
    assert np.array_equal(online(load, "user/published", cache_dir=cache), other_expected)


def test_force_download_downloads_again(online, published, hub, expected, cache):
    online(load, "user/published", cache_dir=cache)
    hub.requests.clear()
    assert np.array_equal(online(load, "user/published", cache_dir=cache, force_download=True), expected)
    assert set(NEEDED) <= hub.fetched()


def test_a_missing_repository(online, hub, cache):
    with pytest.raises(
        OSError, match=f"user/nowhere is neither a local folder nor a repository at {hub.url}"
    ) as raised:
        online(load, "user/nowhere", cache_dir=cache)
    assert "\n" not in str(raised.value)


def test_a_private_repository_needs_the_token(online, hub, files, expected, cache):
    hub.create("user/private", files, private=True)
    with pytest.raises(OSError, match="run `hf auth login` or pass token="):
        online(load, "user/private", token=False, cache_dir=cache)
    assert np.array_equal(online(load, "user/private", token=TOKEN, cache_dir=cache), expected)


def test_a_gated_repository_says_where_to_request_access(online, published, hub, cache):
    published.gated = True
    with pytest.raises(OSError, match=f"user/published is gated: request access at {hub.url}/user/published"):
        online(load, "user/published", cache_dir=cache)


# --- what may be missing or broken ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("model_index.json", "user/published holds no pipeline: it has no model_index.json"),
        ("vae/config.json", "no file named config.json found in directory .*vae"),
        ("scheduler/scheduler_config.json", "no file named scheduler_config.json found in directory .*scheduler"),
        ("transformer/diffusion_pytorch_model.safetensors", "no file named .* found in directory .*transformer"),
    ],
)
def test_missing_files(online, published, cache, path, message):
    published.commit({path: None})
    with pytest.raises(OSError, match=message) as raised:
        online(load, "user/published", cache_dir=cache)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("status", [403, 503])
def test_a_hub_that_answers_with_errors(online, published, hub, expected, cache, status):
    hub.status = status
    with pytest.raises(OSError, match=f"user/published .*{hub.url}") as raised:
        online(load, "user/published", cache_dir=cache)
    assert "\n" not in str(raised.value)
    hub.status = None
    online(load, "user/published", cache_dir=cache)
    hub.status = status
    assert np.array_equal(online(load, "user/published", cache_dir=cache), expected)


def test_offline(online, offline, published, hub, expected, cache):
    for client, options in ((offline, {}), (online, {"local_files_only": True})):
        with pytest.raises(
            FileNotFoundError, match=f"The cache {cache} lacks files of user/published .model_index.json"
        ):
            client(load, "user/published", cache_dir=cache, **options)
    online(load, "user/published", cache_dir=cache)
    hub.requests.clear()
    assert np.array_equal(offline(load, "user/published", cache_dir=cache), expected)
    assert np.array_equal(online(load, "user/published", cache_dir=cache, local_files_only=True), expected)
    assert hub.requests == []


# --- untrusted repositories ----------------------------------------------------------------------------------------


class Payload:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.fixture
def trap(tmp_path) -> tuple[Path, dict[str, bytes]]:
    """The file that code or a pickle of the repository would write, and these."""
    mark = tmp_path / "was_here"
    code = f"from pathlib import Path\nPath({str(mark)!r}).touch()\n".encode()
    pickled = pickle.dumps(Payload(mark))
    names = ("pipeline.py", "evil.py", "transformer/evil.py", "vae/autoencoder.autoencoder_kl_vidtwin.py")
    return mark, {**dict.fromkeys(names, code), "vae/diffusion_pytorch_model.bin": pickled}


def test_code_and_pickles_are_not_downloaded(online, hub, files, trap, expected, cache):
    mark, traps = trap
    hub.create("user/trap", {**files, **traps})
    assert np.array_equal(online(load, "user/trap", cache_dir=cache), expected)
    assert not hub.fetched() & set(traps)
    assert not mark.exists()


def test_pickled_weights_are_not_loaded(online, hub, files, trap, cache):
    mark, traps = trap
    hub.create("user/pickle", {**files, **traps, "vae/diffusion_pytorch_model.safetensors": None})
    with pytest.raises(OSError, match=r"no file named .* found in directory .*vae"):
        online(load, "user/pickle", cache_dir=cache)
    assert not hub.fetched() & set(traps)
    with pytest.raises(OSError, match=r"diffusion_pytorch_model\.bin"):  # Diffusers fetches it, and does not unpickle
        online(load_model, "vae", "user/pickle", subfolder="vae", cache_dir=cache)
    assert not mark.exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"transformer": ["evil", "Model"]}, r'loads its transformer from \["evil", "Model"\], but only classes of'),
        (
            {"vae": ["os", "system"]},
            r'loads its vae from \["os", "system"\], but only classes of diffusers, autoencoder',
        ),
        ({"vae": ["transformers", "CLIPTextModel"]}, "but only classes of diffusers"),
        ({"more": ["evil", "Model"]}, "loads its more from"),
        ({"vae": ["autoencoder_kl", "AutoencoderKL"]}, "but only classes of diffusers"),
        ({"vae": "autoencoder"}, "has no vae: pass vae="),
        ({"_class_name": ["pipeline", "VidTwinPipeline"]}, "does not describe a VidTwinPipeline"),
        ({"_class_name": "StableDiffusionPipeline"}, "does not describe a VidTwinPipeline"),
    ],
)
def test_a_model_index_with_unknown_modules(online, hub, files, trap, cache, changes, message):
    mark, traps = trap
    index = {**json.loads(files["model_index.json"]), **changes}
    hub.create("user/unknown", {**files, **traps, "model_index.json": json.dumps(index).encode()})
    with pytest.raises(ValueError, match=message) as raised:
        online(load, "user/unknown", cache_dir=cache)
    assert "model_index.json of user/unknown" in str(raised.value)
    assert hub.fetched() == {"model_index.json"}
    assert not mark.exists()


@pytest.mark.parametrize(
    "entry", [["autoencoder.nowhere", "Model"], ["autoencoder.blocks", "sincos_1d"], ["autoencoder.blocks", "Nothing"]]
)
def test_a_model_index_with_unknown_classes(online, hub, files, trap, cache, entry):
    mark, traps = trap
    index = {**json.loads(files["model_index.json"]), "vae": entry}
    hub.create("user/unknown", {**files, **traps, "model_index.json": json.dumps(index).encode()})
    with pytest.raises(Exception, match=r"autoencoder|class"):
        online(load, "user/unknown", cache_dir=cache)
    assert not hub.fetched() & set(traps)
    assert not mark.exists()


@pytest.mark.parametrize("text", ["{", "[]"])
def test_an_invalid_model_index(online, hub, files, cache, text):
    hub.create("user/broken", {**files, "model_index.json": text.encode()})
    with pytest.raises(ValueError, match=r"model_index\.json of user/broken does not describe a VidTwinPipeline"):
        online(load, "user/broken", cache_dir=cache)


@pytest.mark.parametrize(
    "options",
    [{"trust_remote_code": True}, {"custom_pipeline": "mine"}, {"use_onnx": True}, {"use_safetensors": False}],
)
def test_code_and_pickles_cannot_be_requested(options):
    with pytest.raises(ValueError, match=f"only JSON and safetensors: leave out {next(iter(options))}"):
        VidTwinPipeline.from_pretrained("user/published", **options)


# --- the card ------------------------------------------------------------------------------------------------------


def test_the_card_describes_the_pipeline_and_its_script_runs(online, hub, folder, tmp_path):
    online(push, "pipeline", folder, "user/with-card")
    _, header, text = hub.repos["user/with-card"].files["README.md"].decode().split("---\n", 2)
    assert "library_name: diffusers\n" in header
    assert "pipeline_tag: other\n" in header
    assert "license: unknown\n" in header
    assert "- class-conditional\n" in header
    for fact in ("# with-card", "4 frames, 32 x 32 pixels", "4 x 3 x 2 x 2 | 48", "8 x 4 x 4 | 128", "107,724"):
        assert fact in text
    assert "3 classes, by id: 0 Biking, 1 Diving, 2 Yo Yo." in text

    script = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    assert len(script.splitlines()) == 5
    assert "video.gif" in online(run_script, script.replace('Biking"', 'Biking", num_inference_steps=1'), tmp_path)


@pytest.mark.parametrize(
    ("kind", "facts"),
    [
        (
            "vae",
            [
                "A video autoencoder",
                "- video-autoencoder\n",
                "119,912",
                "1.43 % of the values of a clip",
                "8 x 4 x 4 | 128",
            ],
        ),
        ("transformer", ["A diffusion transformer", "12 + 16 tokens", "107,724", "4 x 3 x 2 x 2 | 48", "3 classes"]),
    ],
)
def test_the_card_of_a_model(online, hub, folder, tmp_path, kind, facts):
    online(push, kind, folder / kind, f"user/{kind}-card")
    card = hub.repos[f"user/{kind}-card"].files["README.md"].decode()
    for fact in (f"# {kind}-card", "library_name: diffusers\n", *facts):
        assert fact in card
    online(run_script, re.search(r"```python\n(.*?)```", card, re.DOTALL)[1], tmp_path)


def test_the_card_of_an_unconditional_pipeline(vae, make_transformer):
    pipe = VidTwinPipeline(vae, make_transformer(num_classes=None), default_scheduler())
    card = str(pipe.model_card("user/free"))
    assert "Unconditional generation" in card and "- unconditional\n" in card
    assert "frames = pipeline().frames[0]" in card
    assert "## Classes" not in card


def test_a_pipeline_without_an_autoencoder(online, hub, folder, tmp_path, cache):
    online(push, "pipeline", folder, "user/mute", vae=None)
    assert not [path for path in hub.repos["user/mute"].files if path.startswith("vae")]
    card = hub.repos["user/mute"].files["README.md"].decode()
    assert "generation of latents" in card and "AutoencoderKLVidTwin" not in card
    online(run_script, re.search(r"```python\n(.*?)```", card, re.DOTALL)[1], tmp_path)
    with pytest.raises(ValueError, match=r"model_index\.json of user/mute has no vae: pass vae= to from_pretrained"):
        online(load, "user/mute", cache_dir=cache)


def test_the_published_card_is_kept(online, hub, folder):
    hub.create("user/licensed", {"README.md": b"---\nlicense: mit\n---\n"})  # as the Hub's form for new models leaves
    online(push, "pipeline", folder, "user/licensed")
    card = hub.repos["user/licensed"].files["README.md"].decode()
    assert "license: mit\n" in card and "unknown" not in card and "## Usage" in card

    mine = b"---\nlicense: mit\n---\n\n# Mine\n"
    hub.create("user/mine", {"README.md": mine})
    online(push, "pipeline", folder, "user/mine")
    card = hub.repos["user/mine"].files["README.md"].decode()
    assert "# Mine" in card and "## Usage" not in card
