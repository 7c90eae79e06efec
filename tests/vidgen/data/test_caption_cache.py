"""The captions of a latent cache: embedded once, drawn by (seed, epoch, index), refused for another encoder."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from tiny_text import tiny_text_encoder

from pipelines.text import encode_captions
from vidgen.common.errors import UserError
from vidgen.common.loading import load_text_encoder, text_encoder_hash
from vidgen.data import caption_cache
from vidgen.data.caption_cache import EMBEDDINGS, INDEX, prepare_captions
from vidgen.data.config import TextConfig
from vidgen.data.types import VideoFile

CAPTIONS = [("a red disc orbits",), ("two dogs jump", "a ring zooms", "a red disc orbits"), (), ("",)]


@pytest.fixture(scope="module")
def encoder():
    return tiny_text_encoder()


@pytest.fixture
def prepare(tmp_path, monkeypatch):
    """Cache captions in a folder."""

    def run(encoder=None, captions=CAPTIONS, seed=0, required=True, **config):
        monkeypatch.setattr(caption_cache, "read_captions", lambda root, files: captions)
        files = [VideoFile(Path(f"{i}.mp4"), None) for i in range(len(captions))]
        config = TextConfig("small" if encoder is None else "folder", **config)
        return prepare_captions(tmp_path, "root", files, config, seed, encoder, Accelerator(cpu=True), required)

    return run


def test_each_caption_is_embedded_once(prepare, encoder, tmp_path, monkeypatch):
    embedded = []
    monkeypatch.setattr(
        caption_cache, "encode_captions", lambda texts, *args: embedded.extend(texts) or encode_captions(texts, *args)
    )
    cache = prepare(encoder, batch_size=2)
    assert embedded == cache.texts == ["", "a red disc orbits", "two dogs jump", "a ring zooms"]
    cache = pickle.loads(pickle.dumps(prepare(encoder)))
    assert len(embedded) == 4, "found in the cache"
    for number, text in enumerate(cache.texts):
        expected, mask, _ = encode_captions([text], encoder)
        item = cache.read(number)
        assert item["text"].shape == (cache.max_tokens, 16) and item["text_mask"].sum() == mask.sum()
        torch.testing.assert_close(item["text"][item["text_mask"]], expected[mask], rtol=1e-4, atol=1e-5)
        assert not item["text"][~item["text_mask"]].any()


def test_several_captions_are_drawn_by_seed_epoch_and_index(prepare, encoder):
    cache = prepare(encoder)
    drawn = [[cache.draw(1, epoch, index) for index in range(40)] for epoch in range(2)]
    assert all(structure == dynamics for structure, dynamics in drawn[0])
    assert {structure for structure, _ in drawn[0] + drawn[1]} == {1, 2, 3} and drawn[0] != drawn[1]
    assert drawn[0] == [prepare(encoder).draw(1, 0, index) for index in range(40)]
    assert drawn[0] != [prepare(encoder, seed=1).draw(1, 0, index) for index in range(40)]
    assert [cache.draw(video, 3, 5) for video in (0, 2, 3)] == [(1, 1), (0, 0), (0, 0)]
    assert cache.examples(2) == ["a red disc orbits", "a ring zooms"] and len(cache.examples(9)) == 3


def test_a_fraction_of_the_clips_has_separate_captions(prepare, encoder):
    together, cache = prepare(encoder), prepare(encoder, separate_captions=0.5)
    pairs = [cache.draw(1, 0, index) for index in range(2000)]
    assert [a for a, _ in pairs] == [together.draw(1, 0, index)[0] for index in range(2000)]
    assert sum(a != b for a, b in pairs) == pytest.approx(2000 * 0.5 * 2 / 3, abs=90), (
        "a third draw the same one again"
    )
    assert cache.draw(0, 0, 0) == (1, 1) and cache.draw(2, 0, 0) == (0, 0)
    index = next(i for i, (a, b) in enumerate(pairs) if a != b)
    item = cache.sample(1, 0, index)
    for stream, number in enumerate(pairs[index]):
        for name, tensor in cache.read(number).items():
            assert torch.equal(item[name][stream], tensor)
    assert together.sample(1, 0, index)["text_mask"].shape == (together.max_tokens,)
    assert cache.tokens_per_clip == 2 * together.tokens_per_clip == 2 * cache.max_tokens


def test_captions_of_an_encoder_in_training_are_kept_as_text(prepare, encoder, tmp_path):
    cache = prepare()
    assert not (tmp_path / EMBEDDINGS).exists()
    assert cache.tokenize(encoder.tokenizer, 24) == 0
    item = cache.read(1)
    assert (
        encoder.tokenizer.decode(item["text"][item["text_mask"]], skip_special_tokens=True).strip() == CAPTIONS[0][0]
    )
    assert not cache.read(0)["text_mask"].any()
    assert cache.tokenize(encoder.tokenizer, 3) == 3 and cache.max_tokens == 3


@pytest.mark.parametrize(
    ("max_length", "limit"),
    [(128, "24 tokens, the maximum of the text encoder"), (24, "text.max_length=24 tokens"), (5, "text.max_length=5")],
)
def test_cut_captions_are_counted_with_the_limit_that_cuts(prepare, encoder, capsys, max_length, limit):
    cache = prepare(encoder, captions=[("a red disc " * 20,), ("a disc",)], max_length=max_length)
    assert f"warning: 1 of 2 captions are cut at {limit}" in capsys.readouterr().out
    assert cache.max_tokens == min(max_length, 24)


def test_another_encoder_length_or_data_is_refused(prepare, encoder):
    prepare(encoder)
    other = tiny_text_encoder(("other", "words"))
    for changes, reason in (
        ({"encoder": other}, r"cached for another text encoder \("),
        ({}, r"cached for another text encoder \([0-9a-f]{12}, now small\)"),
        ({"encoder": encoder, "max_length": 9}, r"cached for another text\.max_length \(128, now 9\)"),
        ({"encoder": encoder, "captions": [("a",)] * 4}, r"cached for another captions \("),
    ):
        with pytest.raises(UserError, match=reason + r".*delete captions\.json and captions\.safetensors") as raised:
            prepare(**changes)
        assert "keeps the latents" in str(raised.value)


def test_damaged_files_and_missing_captions_are_errors(prepare, encoder, tmp_path):
    with pytest.raises(UserError, match=r"text\.encoder is set, but no video of root has a caption"):
        prepare(encoder, captions=[(), ("",)])
    prepare(encoder)
    index = (tmp_path / INDEX).read_text()
    changed = json.loads(index)
    changed["starts"][-1] += 1
    for content in ("{", "{}", json.dumps(changed)):
        (tmp_path / INDEX).write_text(content)
        with pytest.raises(UserError, match=r"The captions in .* cannot be read"):
            prepare(encoder)
    (tmp_path / INDEX).write_text(index)
    (tmp_path / EMBEDDINGS).unlink()
    with pytest.raises(UserError, match=r"The captions in .* cannot be read"):
        prepare(encoder)


@pytest.mark.parametrize("is_frozen", [True, False])
def test_videos_without_any_caption_have_the_null_token(prepare, encoder, is_frozen):
    for _ in range(2):  # encoded, then found
        cache = prepare(encoder if is_frozen else None, captions=[(), ("",)], required=False)
        if not is_frozen:
            assert cache.tokenize(encoder.tokenizer, 24) == 0
        item = cache.sample(1, 0, 0)
        assert len(item["text"]) == cache.max_tokens == 1 and not item["text_mask"].any()
        assert cache.texts == [""] and cache.examples(4) == []


# --- text encoders of transformers -----------------------------------------------------------------------------------


def save_encoder(folder: Path, model, tokenizer, as_pipeline: bool = False) -> str:
    model.save_pretrained(folder / "text_encoder" if as_pipeline else folder)
    tokenizer.save_pretrained(folder / "tokenizer" if as_pipeline else folder)
    return str(folder)


def tiny_models():
    from transformers import (
        BertConfig,
        BertModel,
        CLIPTextConfig,
        CLIPTextModel,
        T5Config,
        T5Model,
        UMT5Config,
        UMT5EncoderModel,
    )

    sizes = dict(vocab_size=300, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    clip = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=300)
    return {
        "T5EncoderModel": T5Model(T5Config(**sizes)),  # with its decoder, which is left out
        "UMT5EncoderModel": UMT5EncoderModel(UMT5Config(**sizes)),
        "CLIPTextModel": CLIPTextModel(CLIPTextConfig(**clip, eos_token_id=1)),
        "BertModel": BertModel(BertConfig(**clip), add_pooling_layer=False),
    }


def test_text_encoders_of_transformers_are_loaded(encoder, tmp_path):
    for name, model in tiny_models().items():
        loaded = load_text_encoder(save_encoder(tmp_path / name, model, encoder.tokenizer))
        assert type(loaded.model).__name__ == name
        assert not loaded.model.training and not any(p.requires_grad for p in loaded.model.parameters())
        embeddings, mask, _ = encode_captions(["a red disc", "", "two dogs jump over it"], loaded)
        assert embeddings.shape[2] == 16 and embeddings.isfinite().all()
        alone, alone_mask, _ = encode_captions(["a red disc"], loaded)
        torch.testing.assert_close(embeddings[:1][mask[:1]], alone[alone_mask], rtol=1e-4, atol=1e-5)
        in_pipeline = save_encoder(tmp_path / f"{name}-pipeline", loaded.model, loaded.tokenizer, as_pipeline=True)
        if name != "BertModel":  # its pooler, which is not used, is newly initialized
            assert text_encoder_hash(load_text_encoder(in_pipeline)) == text_encoder_hash(loaded)


def test_folders_without_a_text_encoder_are_refused(encoder, tmp_path):
    with pytest.raises(UserError, match=r"No text encoder in .*nowhere"):
        load_text_encoder(str(tmp_path / "nowhere"))
    folder = Path(save_encoder(tmp_path / "pickled", encoder.model, encoder.tokenizer))
    (folder / "model.safetensors").unlink()
    torch.save(encoder.model.state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"The model in .*pickled cannot be loaded"):
        load_text_encoder(str(folder))


def test_tokens_are_hidden_by_seed_epoch_and_index_but_never_all(prepare, encoder):
    cache = prepare(encoder)
    whole = cache.sample(0, 0, 0)["text_mask"]
    cache.token_dropout = 0.4
    masks = torch.stack([cache.sample(0, 0, index)["text_mask"] for index in range(500)])
    assert not masks[:, ~whole].any() and masks.any(dim=1).all()
    assert masks[:, whole].float().mean().item() == pytest.approx(0.6, abs=0.06)
    assert torch.equal(masks[7], cache.sample(0, 0, 7)["text_mask"])
    others = torch.stack([cache.sample(0, 1, index)["text_mask"] for index in range(500)])
    assert not torch.equal(masks, others)
    cache.token_dropout = 1.0
    assert torch.equal(cache.sample(0, 0, 0)["text_mask"], whole)
