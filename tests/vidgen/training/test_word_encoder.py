"""`text.encoder=words`: vectors fitted to latents generalize to new combinations of words, and stay as they are."""

from __future__ import annotations

import shutil
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_processes import assert_near, finish, start
from test_text_training import SHORT_RUN, STEADY, captioned, sample, text_config  # noqa: F401, fixtures

from pipelines.text import encode_captions
from runs import assert_same_run, assert_same_tensors, from_parent, numbers
from vidgen.common.errors import UserError
from vidgen.common.loading import load_pipeline, load_text_encoder, text_encoder_hash
from vidgen.data.caption_cache import CaptionCache
from vidgen.data.config import TextConfig
from vidgen.data.words import split_words
from vidgen.training import word_encoder
from vidgen.training.dit_trainer import train_dit
from vidgen.training.word_encoder import build_word_tokenizer, fit_word_encoder

WORDS = ["text.encoder=words", "text.hidden_size=16"]
VERBS, THINGS, ROOMS = ("open", "close", "move", "lift"), ("cup", "drawer", "lid", "cloth"), ("kitchen", "office")


def make_cache(seed: int, held_out: bool, count: int = 600) -> SimpleNamespace:
    """Latents that depend on the thing of a caption, with noise; a fifth of the combinations of words is held out."""
    generator = torch.Generator().manual_seed(seed)
    combinations = [c for i, c in enumerate(product(range(4), range(4), range(2))) if (i % 5 == 0) == held_out]
    drawn = [combinations[i] for i in torch.randint(len(combinations), (count,), generator=generator).tolist()]
    captions = [f"{VERBS[v]} the {THINGS[t]}, in the {ROOMS[r]}" for v, t, r in drawn]
    effects = torch.randn(4, 40, generator=torch.Generator().manual_seed(0))
    latents = torch.stack([effects[t] for _, t, _ in drawn])
    latents = 3 + latents + torch.randn(latents.shape, generator=generator)
    return as_cache(latents, captions)


def as_cache(latents: torch.Tensor, captions: list[str]) -> SimpleNamespace:
    texts = SimpleNamespace(texts=["", *dict.fromkeys(captions)])
    pairs = list(zip(latents, captions, strict=True))
    return SimpleNamespace(captions=texts, read_captioned=lambda max_clips: pairs)


def explained_variance(encoder, seen: SimpleNamespace, unseen: SimpleNamespace, shrink: bool = True) -> float:
    """Of the latents of unseen combinations, by a regression on the embeddings of seen ones in training mode."""
    (x, captions), (y, others) = (zip(*cache.read_captioned(0), strict=True) for cache in (seen, unseen))
    x, y = torch.stack(x), torch.stack(y)
    inputs = []
    for texts, is_training in ((captions, True), (others, not shrink)):
        encoder.model.train(is_training)
        embeddings = encode_captions(texts, encoder)[0][:, 0]
        inputs.append(torch.cat([embeddings, torch.ones(len(embeddings), 1)], dim=1))
    weights = torch.linalg.lstsq(inputs[0], x, driver="gelsd").solution
    return 1 - ((inputs[1] @ weights - y).var() / (y - x.mean(dim=0)).var()).item()


@pytest.mark.parametrize("max_values", [4096, 20])
def test_embeddings_explain_the_latents_of_unseen_combinations(monkeypatch, max_values):
    monkeypatch.setattr(word_encoder, "MAX_VALUES", max_values)
    seen, unseen = make_cache(1, held_out=False), make_cache(2, held_out=True)
    assert not set(seen.captions.texts[1:]) & set(unseen.captions.texts)
    encoder = fit_word_encoder(TextConfig(hidden_size=3), seen)
    latents, captions = zip(*seen.read_captioned(0), strict=True)
    latents = torch.stack(latents)
    explainable = 1 - 1 / latents.var(dim=0).mean().item()  # the rest is noise
    assert explained_variance(encoder, seen, unseen) > 0.9 * explainable

    shuffled = as_cache(latents.roll(50, dims=0), captions)
    assert explained_variance(fit_word_encoder(TextConfig(hidden_size=3), shuffled), seen, unseen) < 0.6 * explainable


@pytest.mark.parametrize("seed", range(3))
def test_shrinkage_helps_with_captions_that_were_not_trained_on(seed):
    seen, unseen = make_cache(10 + seed, held_out=False, count=40), make_cache(100 + seed, held_out=True)
    encoder = fit_word_encoder(TextConfig(hidden_size=8), seen)
    assert not encoder.model.training and encoder.model.shrinkage.max() == 1
    gain = explained_variance(encoder, seen, unseen) - explained_variance(encoder, seen, unseen, shrink=False)
    assert gain > 0.02


def test_a_sketch_keeps_inner_products_on_average(monkeypatch):
    x = torch.randn(50, 3000, generator=torch.Generator().manual_seed(3)) + torch.linspace(-1, 1, 3000)
    assert torch.equal(word_encoder.sketch(x[0]), x[0])
    monkeypatch.setattr(word_encoder, "MAX_VALUES", 1000)
    sketches = torch.stack([word_encoder.sketch(row) for row in x])
    assert sketches.shape == (50, 1000) and torch.equal(sketches[0], word_encoder.sketch(x[0]))
    assert sketches.pow(2).sum().item() == pytest.approx(x.pow(2).sum().item(), rel=0.05)
    error = (sketches @ sketches.T - x @ x.T).fill_diagonal_(0)
    assert abs(error.mean().item()) < 0.1 * (x @ x.T).mean().item()


def test_an_embedding_is_that_of_the_known_words_of_a_caption():
    encoder = fit_word_encoder(TextConfig(hidden_size=64), make_cache(1, held_out=False))
    assert encoder.model.config.hidden_size == 64 and not encoder.model.projection.weight[10:].any()
    captions = ["Lift the cup, in the office", "the office... the CUP in lift lift", "Lift a xylophone cup, office"]
    embeddings, mask, _ = encode_captions([*captions, "lift the lid, in the office", "", "xylophone"], encoder)
    assert mask.sum(dim=1).tolist() == [7, 8, 6, 7, 0, 2]
    assert (embeddings == embeddings[:, :1]).all() and (embeddings[0, 0] == embeddings[1:3, 0]).all()
    assert not torch.allclose(embeddings[3], embeddings[0], atol=0.1)
    torch.testing.assert_close(embeddings.norm(dim=2), torch.ones(6, 8))
    assert torch.equal(embeddings[4, 0], embeddings[5, 0]), "no known word is the mean caption"


def test_the_tokenizer_splits_words_as_the_bags_do():
    captions = ["Pick-up the CUP, à côté!", "x_y  2 cups", "„Orbit“ 星"]
    words = [split_words(caption) for caption in captions]
    tokenizer = build_word_tokenizer(sorted({word for line in words for word in line}), 9)
    for caption, line in zip(captions, words, strict=True):
        assert tokenizer.convert_ids_to_tokens(tokenizer(caption)["input_ids"]) == [*line, "</s>"]
    assert tokenizer.convert_ids_to_tokens(tokenizer("cups fly")["input_ids"]) == ["cups", "<unk>", "</s>"]


def test_captions_that_share_no_word_are_refused():
    cache = make_cache(1, held_out=False)
    cache.captions.texts = ["", "a b", "c d", "a b e"]
    with pytest.raises(UserError, match=r"requires words that at least 3 different captions share"):
        fit_word_encoder(TextConfig(), cache)


@pytest.fixture(scope="module")
def trained(text_config, tmp_path_factory) -> Path:  # noqa: F811
    settings = [*SHORT_RUN, "text.token_dropout=0.3"]
    return train_dit(text_config(tmp_path_factory.mktemp("words") / "run", *settings, encoder=WORDS))


def test_a_run_saves_its_vectors_and_resumes_bit_for_bit(text_config, trained, tmp_path):  # noqa: F811
    run, cut = trained.parent, tmp_path / "cut"
    assert_same_tensors(trained / "text_encoder", run / "text")
    pipeline = load_pipeline(str(trained))
    assert {"shape", "das"} <= set(pipeline.tokenizer.get_vocab())
    assert not torch.equal(sample(pipeline, prompt="a shape"), sample(pipeline, prompt="das Bild"))
    assert {"validation/loss", "validation/structure"} < set(numbers(run)[4])

    shutil.copytree(run / "checkpoint-2", cut / "checkpoint-2")
    shutil.copytree(run / "text", cut / "text")
    lines = (run / "metrics.jsonl").read_text().splitlines(True)
    (cut / "metrics.jsonl").write_text("".join(line for line in lines if '"step": 2' in line or '"step": 1' in line))
    settings = [*SHORT_RUN, "text.token_dropout=0.3", "resume=latest"]
    train_dit(text_config(cut, *settings, encoder=WORDS))
    assert_same_run(run, cut)


def test_a_run_from_a_parent_keeps_its_vectors(text_config, trained, tmp_path):  # noqa: F811
    start = train_dit(text_config(tmp_path / "start", *from_parent(trained, "train.max_train_steps=0"), encoder=WORDS))
    for part in ("text_encoder", "transformer"):
        assert_same_tensors(trained / part, start / part)

    with pytest.raises(
        UserError, match=r"text\.hidden_size is 24, but the word vectors of .*, which are kept, have 16"
    ):
        train_dit(text_config(tmp_path / "wide", *from_parent(trained), "text.hidden_size=24", encoder=WORDS))

    # The folder of the pipeline is a frozen encoder, whose embeddings are cached.
    frozen = text_config(tmp_path / "frozen", *from_parent(trained), encoder=[f"text.encoder={trained}"])
    saved = load_text_encoder(str(train_dit(frozen)))
    assert text_encoder_hash(saved) == text_encoder_hash(load_text_encoder(str(trained)))
    assert (tmp_path / "frozen" / "latents" / "captions.safetensors").exists()


def test_a_run_from_a_parent_with_another_encoder_fits_new_vectors(text_config, tmp_path, capsys):  # noqa: F811
    parent = train_dit(text_config(tmp_path / "parent", "train.max_train_steps=1"))
    final = train_dit(text_config(tmp_path / "run", *from_parent(parent), "train.max_train_steps=1", encoder=WORDS))
    assert "warning: text.encoder is not the text encoder that" in capsys.readouterr().out
    assert type(load_pipeline(str(final)).text_encoder).__name__ == "BagOfWordsModel"


def test_words_are_hidden_in_training_alone(text_config, tmp_path, monkeypatch):  # noqa: F811
    seen = {"train": [], "held out": []}
    read = CaptionCache.sample

    def sample_and_keep(cache, *place):
        item = read(cache, *place)
        seen["held out" if cache.folder.name == "validation" else "train"].append(item["text_mask"].sum().item())
        return item

    monkeypatch.setattr(CaptionCache, "sample", sample_and_keep)
    settings = ["text.token_dropout=0.5", "train.max_train_steps=1", "train.train_batch_size=16", "data.hold_out=true"]
    train_dit(text_config(tmp_path, *settings, encoder=WORDS))
    assert min(seen["held out"]) >= 4 and 1 <= min(seen["train"]) < 4


def test_a_run_with_another_encoder_is_not_resumed(text_config, trained, tmp_path):  # noqa: F811
    run = shutil.copytree(trained.parent, tmp_path / "run", ignore=shutil.ignore_patterns("final"))
    settings = [*SHORT_RUN, "resume=latest", "train.max_train_steps=5"]
    with pytest.raises(UserError, match="cannot be resumed"):
        train_dit(text_config(run, *settings))
    small = train_dit(text_config(tmp_path / "small", *SHORT_RUN, "train.max_train_steps=2")).parent
    with pytest.raises(UserError, match="cannot be resumed"):
        train_dit(text_config(small, *settings, encoder=WORDS))


@pytest.mark.parametrize("launcher", ["ddp", "fsdp2"])
@pytest.mark.slow
def test_two_processes_equal_one(text_config, tmp_path, launcher):  # noqa: F811
    settings = ["train.checkpointing_steps=2", "text.token_dropout=0.3", STEADY, "optim.lr_warmup_steps=2"]
    train_dit(text_config(tmp_path / "one", *settings, encoder=WORDS))
    settings += ["train.train_batch_size=2"]
    two, cut = tmp_path / "two", tmp_path / "cut"
    configs = [text_config(two, *settings, encoder=WORDS), text_config(cut, *settings, "resume=latest", encoder=WORDS)]
    finish(start(*configs, launcher=launcher))
    assert_near(tmp_path / "one", two)
    assert numbers(two) == numbers(cut)
    for folder in ("text", "final"):
        assert_same_tensors(two / folder, cut / folder)
    assert_same_tensors(tmp_path / "one" / "text", two / "text")
