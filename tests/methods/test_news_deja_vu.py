"""News Deja Vu: masking rules, the loss against the card's numbers, mining, and that both sides are masked alike."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from raydr.artifacts import open_artifact
from raydr.config import Component
from raydr.data.config import DataConfig
from raydr.data.corpus import Corpus
from raydr.data.ingest import ingest
from raydr.encoders.factory import EncoderFactory
from raydr.encoders.masking import MASK, MaskConfig, Masker, masked, masked_groups
from raydr.encoders.tagger import EntityTagger, TaggerConfig
from raydr.errors import ArtifactError, ConfigError, DataError
from raydr.index.build import build_index
from raydr.index.config import IndexConfig
from raydr.index.embedded import EmbeddedCorpus
from raydr.losses import online_contrastive
from raydr.methods.base import build_method
from raydr.methods.news_deja_vu import MaskTokenEncoder, SameStory
from raydr.stages.config import EmbedConfig, PreprocessConfig, SearchConfig
from raydr.stages.embed import embed_corpus
from raydr.stages.preprocess import preprocess_examples, preprocessed_corpus
from raydr.stages.same_story import StoryConfig, hard_negatives, same_story_examples
from raydr.stages.search import search_corpus
from raydr.train.batches import to_batch, tokenized
from raydr.train.config import TrainConfig
from raydr.train.objective import Labels
from raydr.types import Entity, Passage, Query
from raydr.verbs.config import RunConfig
from raydr.verbs.train import train
from tests.contracts import check_encoder
from tests.taggers import gazetteer_tagger
from tests.train.tiny import tiny_checkpoint

PATH = "raydr.methods.news_deja_vu:NewsDejaVu"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return str(gazetteer_tagger(tmp_path_factory.mktemp("tagger")))


@pytest.fixture(scope="module")
def encoder_folder(tmp_path_factory) -> str:
    return str(tiny_checkpoint(tmp_path_factory.mktemp("encoder") / "model"))


@pytest.fixture
def settings(model, encoder_folder) -> dict:
    tagger = {"model": model, "overlap_tokens": 8, "num_threads": 1}
    return {"model": encoder_folder, "tagger": tagger, "backend": "torch", "precision": "float32", "num_threads": 1}


def masker(model: str, **config) -> Masker:
    return Masker(MaskConfig(**config), EntityTagger(TaggerConfig(model=model, overlap_tokens=8, num_threads=1)))


class TestMasking:
    def test_texts_that_differ_in_names_alone_are_the_same(self, settings):
        """Card, test 1: identical masked strings, cosine 1."""
        method = build_method(Component(import_path=PATH, args=settings))
        texts = ["John Smith of New York met Mary.", "Peter Brown of Paris met George."]
        one, other = (own.masked for own in method.masked(texts))
        assert one == other == "[MASK] of [MASK] met [MASK]."
        a, b = method.encoder().encode_queries([Query(str(n), text) for n, text in enumerate(texts)])
        assert a @ b == pytest.approx(1.0, abs=1e-6)

    def test_one_mask_for_each_entity_and_punctuation_stays(self, model):
        """Card, test 2."""
        text = "John Smith , of New York ."
        assert masker(model).mask([text])[0].masked == "[MASK] , of [MASK] ."
        assert masker(model).mask(["Mary Anna spoke"])[0].masked == "[MASK] [MASK] spoke"

    def test_the_packages_rule(self):
        groups = [("PER", "John Smith"), ("O", ", of"), ("LOC", "New York."), ("PER", ", Mary"), ("ORG", "Yahoo!")]
        assert masked_groups(groups) == "[MASK] , of [MASK]. , [MASK] [MASK]!"
        assert masked_groups([("PER", "Ann"), ("PER", "Bob")]) == "[MASK] [MASK]"
        assert masked_groups(groups, labels_to_mask=["PER"]) == "[MASK] , of New York. , [MASK] Yahoo!"
        assert masked_groups(groups[:3], all_masks_same=False) == "PER , of LOC."

    def test_by_offsets_the_same_punctuation_stays(self):
        text = "saw New York., then"
        assert masked(text, [Entity(4, 13, "LOC")]) == "saw [MASK]., then"
        assert masked("a , Mary b", [Entity(2, 8, "PER")]) == "a , [MASK] b"
        assert masked("so . it", [Entity(3, 4, "PER")]) == "so . it"

    def test_which_kinds_and_how(self, model):
        """Card, test 3."""
        text = "John  went to\tLondon"
        assert masker(model, labels_to_mask=("PER",)).mask([text])[0].masked == "[MASK]  went to\tLondon"
        assert masker(model, all_masks_same=False).mask([text])[0].masked == "PER  went to\tLOC"
        assert masker(model).mask(["no  names"])[0].masked == "no  names"
        package = masker(model, form="package").mask(["no  names here"])[0]
        assert package.masked.split() == ["no", "names", "here"]

    def test_nothing_of_a_long_text_is_lost(self, model):
        """Card, test 5: every character is kept or masked; the package's form ends with the tagger's window."""
        text = "It rained. " * 60 + "Mary left London."
        whole = masker(model).mask([text])[0]
        assert whole.masked == "It rained. " * 60 + "[MASK] left [MASK]."
        short = "Mary left London in the rain"
        assert masker(model).mask([short])[0].masked == masker(model, form="package").mask([short])[0].masked
        lossy = masker(model, form="package").mask([text])[0]
        assert len(lossy.masked) < len(text) / 2 and MASK not in lossy.masked

    def test_ocr_is_cleaned_before(self, model):
        assert masker(model, clean_ocr=True).mask(["Lon-\ndon is\nfar"])[0].masked == "[MASK] is far"
        assert masker(model).mask(["Lon-\ndon"])[0].masked == "Lon-\ndon"


class TestMaskToken:
    def test_the_network_reads_its_own_mask_once_per_name(self, settings):
        """Card, test 4."""
        method = build_method(Component(import_path=PATH, args=settings))
        queries = method.preprocess_queries([Query("q", "John Smith met Mary in London")])
        encoder = method.build_encoder()
        ids = encoder.tokenize_queries(queries)[0]
        assert ids.count(103) == 3
        groups = method.tokenizer().tokenize([Query("q", "Mary")], [[Passage("p", "in Paris", title="John Smith")]])
        assert groups["passages"].ids[0].count(103) == 2 and groups["queries"].ids[0].count(103) == 1

    def test_another_tokenizer_has_another(self, tmp_path):
        """MPNet's: <mask> and </s> </s>."""
        from tokenizers import Tokenizer, models, pre_tokenizers
        from transformers import AutoTokenizer, MPNetConfig, MPNetModel, PreTrainedTokenizerFast

        special = {"bos_token": "<s>", "eos_token": "</s>", "mask_token": "<mask>", "pad_token": "<pad>"}
        words = ["<pad>", "<s>", "</s>", "<mask>", "<unk>", "met", "in"]
        tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, sep_token="</s>", unk_token="<unk>", **special)
        sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
        MPNetModel(MPNetConfig(vocab_size=7, max_position_embeddings=34, **sizes)).save_pretrained(tmp_path)
        fast.save_pretrained(tmp_path)
        assert AutoTokenizer.from_pretrained(tmp_path).mask_token == "<mask>"
        encoder = MaskTokenEncoder(MaskTokenEncoder.Config(model=str(tmp_path), num_threads=1))
        assert encoder.tokenize_queries([Query("q", "[MASK] met [MASK] [SEP]")]) == [[3, 5, 3, 2, 2]]

    def test_masking_without_a_tagger_says_what_to_do(self, encoder_folder):
        method = build_method(Component(import_path=PATH, args={"model": encoder_folder}))
        with pytest.raises(ConfigError, match="train one with"):
            method.encoder().encode_queries([Query("q", "a")])
        args = {"tagger": {"model": "a"}, "tagger_training": {"sources": [{"path": "a"}]}}
        with pytest.raises(ConfigError, match="name a tagger, or train one"):
            build_method(Component(import_path=PATH, args=args))

    def test_it_is_an_encoder(self, settings):
        check_encoder(build_method(Component(import_path=PATH, args=settings)).encoder())


def loss(near: list[float], far: list[float], margin: float = 0.5) -> float:
    distances = torch.tensor([*near, *far])
    positives = torch.tensor([True] * len(near) + [False] * len(far), dtype=torch.bool)
    return online_contrastive(distances, positives, margin=margin).item()


class TestLoss:
    """Card, test 7."""

    def test_by_hand(self):
        assert loss([0.1, 0.4], [0.3, 0.6]) == pytest.approx(0.2)
        assert loss([0.1, 0.2], [0.3, 0.6]) == 0
        assert loss([0.4], [0.3, 0.6]) == pytest.approx(0.2)

    def test_with_one_kind_alone(self):
        assert loss([0.3], []) == 0
        assert loss([0.1, 0.3], []) == pytest.approx(0.09)  # only what is farther than their mean
        assert loss([], [0.2, 0.4]) == pytest.approx(0.09)
        assert loss([], [0.2]) == 0
        assert loss([], []) == 0

    def test_it_is_that_of_sentence_transformers(self):
        from sentence_transformers.losses import OnlineContrastiveLoss

        class Given(torch.nn.Module):
            def forward(self, features):
                return {"sentence_embedding": features["x"]}

        torch.manual_seed(0)
        for number in range(6):
            x, y = torch.randn(2, 8, 3)
            labels = torch.arange(8) % (number % 3 + 2) == 0
            theirs = OnlineContrastiveLoss(Given(), margin=0.5)([{"x": x}, {"x": y}], labels.long())
            distances = 1 - torch.nn.functional.cosine_similarity(x, y)
            assert online_contrastive(distances, labels, margin=0.5).item() == pytest.approx(theirs.item(), abs=1e-5)

    def test_thresholds_carry_no_gradient(self):
        distances = torch.tensor([0.1, 0.4, 0.3, 0.6], requires_grad=True)
        online_contrastive(distances, torch.tensor([True, True, False, False]), margin=0.5).backward()
        assert distances.grad.tolist() == pytest.approx([0.0, 0.8, -0.4, 0.0])

    def test_the_pairs_are_those_of_the_groups(self):
        """Not every query with every passage; a candidate that is known as relevant counts as such."""
        angle = lambda d: [1 - d, (1 - (1 - d) ** 2) ** 0.5]  # noqa: E731
        queries = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
        passages = torch.tensor([angle(0.1), angle(0.3), angle(0.4), angle(0.6)]) * 3
        labels = Labels(torch.tensor([0, 1, 2, 3]), torch.tensor([[0], [2]]))
        output = SameStory(0.5).loss(queries, passages, labels)
        assert output.loss.item() == pytest.approx(0.2, abs=1e-5)
        assert output.metrics["accuracy"] == 1.0
        known = dataclasses.replace(labels, positive_rows=torch.tensor([[0, 1], [2, 3]]))
        assert SameStory(0.5).loss(queries, passages, known).loss.item() == pytest.approx(0.16 + 0.36, abs=1e-5)


class TestHardNegatives:
    """Card, test 8."""

    def test_no_common_story_or_topic_and_near_enough(self):
        rng = np.random.default_rng(0)
        embeddings = rng.normal(size=(60, 4)).astype(np.float32)
        stories = [None if n % 11 == 0 else n % 7 for n in range(60)]
        topics = [frozenset(rng.choice(list("abcde"), rng.integers(0, 3), replace=False)) for _ in range(60)]
        unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
        found = hard_negatives(embeddings, stories, topics, max_distance=0.4, num_negatives=60)
        for row, own in enumerate(found):
            expected = {
                other
                for other in range(60)
                if stories[row] is not None
                and stories[other] is not None
                and stories[other] != stories[row]
                and not topics[row] & topics[other]
                and 1 - unit[row] @ unit[other] < 0.4
            }
            assert {other for other, _ in own} == expected
            assert [distance for _, distance in own] == sorted(distance for _, distance in own)
        assert any(found)
        few = hard_negatives(embeddings, stories, topics, max_distance=0.4, num_negatives=2)
        assert few == [own[:2] for own in found]


@pytest.fixture
def news(tmp_path):
    """Six articles of three stories as a corpus."""
    import json

    rows = [
        ("a1", "fire", ["accidents"], "John Smith saw the fire in London burn all night"),
        ("a2", "fire", ["accidents"], "The fire in Paris burnt and Mary Jones saw it at night"),
        ("b1", "vote", ["politics"], "Parliament voted on the tax and George Brown lost the vote"),
        ("b2", "vote", ["politics"], "The tax was voted down by Congress and Anna lost"),
        ("c1", "blaze", ["accidents"], "Peter saw the blaze at night in Boston"),
        ("d1", "", [], "Somebody told nothing"),
    ]
    (tmp_path / "news.jsonl").write_text(
        "".join(json.dumps({"_id": i, "story": s or None, "topics": t, "text": x}) + "\n" for i, s, t, x in rows)
    )
    return ingest(DataConfig(path=str(tmp_path / "news.jsonl")), tmp_path / "corpus")


def embedded(corpus: Corpus, method: Component, folder):
    return embed_corpus(corpus, EncoderFactory(method), EmbedConfig(), folder, use_ray=False, method=method)


def test_same_story_pairs_of_a_corpus_and_their_masked_form(news, settings, tmp_path):
    method = Component(import_path=PATH, args=settings)
    embedded(news, method, tmp_path / "embed")
    config = StoryConfig(topics="topics", max_distance=2.0)
    examples = same_story_examples(news, tmp_path / "embed", config, tmp_path / "examples")
    assert examples.query_ids == ["a1", "a2", "b1", "b2"]
    ids = examples.passage_ids
    assert [[ids[row] for row in examples.positives(n)] for n in range(4)] == [["a2"], ["a1"], ["b2"], ["b1"]]
    assert [{ids[row] for row in examples.negatives(n)} for n in range(4)] == [
        {"b1", "b2"},  # not c1, which shares a topic, nor d1, of which nothing is known
        {"b1", "b2"},
        {"a1", "a2", "c1"},
        {"a1", "a2", "c1"},
    ]
    built = build_method(method)
    plain = preprocess_examples(examples, built, tmp_path / "masked")
    assert plain.query(0).text == "[MASK] saw the fire in [MASK] burn all night"
    assert [p.text for p in plain.passages([0])] == [own.masked for own in built.masked(["The fire in Paris burnt and "
        "Mary Jones saw it at night"])]  # fmt: skip
    # What training reads of the masked examples is what it would read of the others.
    unmasked = build_method(Component(import_path=PATH, args={**settings, "masking": False, "tagger": None}))
    groups = next(iter(unmasked.build_batches(plain, batch_size=4, seed=0)))
    own, other = (
        to_batch(tokenized(groups, by.tokenizer(), of.artifact.path), 0)
        for by, of in ((unmasked, plain), (built, examples))
    )
    assert torch.equal(own.passages.ids, other.passages.ids) and torch.equal(own.queries.ids, other.queries.ids)
    with pytest.raises(DataError, match="no column 'plot'"):
        same_story_examples(news, tmp_path / "embed", StoryConfig(story="plot"), tmp_path / "other")


def test_an_index_of_masked_text_refuses_what_is_masked_otherwise(news, settings, tmp_path, model):
    """Card, tests 6 and 9: rows of length 1, exact search, one shard or several; another mask or none is refused."""
    method = Component(import_path=PATH, args=settings)
    artifact = embedded(news, method, tmp_path / "embed")
    for shards in (1, 2):
        build_index(
            news, artifact, IndexConfig(factory="Flat", num_shards=shards), tmp_path / f"{shards}", use_ray=False
        )
    queries = [Query(row["passage_id"], row["text"]) for table in news.passages() for row in table.to_pylist()]
    search = SearchConfig(k=6)
    runs = [
        search_corpus(
            tmp_path / str(shards), queries, EncoderFactory(method), search, tmp_path / f"run{shards}", use_ray=False
        )
        for shards in (1, 2)
    ]
    lines = [(run.path / "run.trec").read_text() for run in runs]
    assert lines[0] == lines[1]
    vectors = EncoderFactory(method)().encode_queries(queries)
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(1.0, abs=1e-6)
    for line in lines[0].splitlines():
        query, _, passage, rank, score, _ = line.split()
        row, column = (next(n for n, q in enumerate(queries) if q.query_id == id_) for id_ in (query, passage))
        assert float(score) == pytest.approx(vectors[row] @ vectors[column], abs=1e-5)
        assert rank != "1" or (passage == query and float(score) == pytest.approx(1.0, abs=1e-5))
    other = str(gazetteer_tagger(tmp_path / "other", {"bath": "B-LOC"}))
    others = [
        {**settings, "masking": False},
        {**settings, "mask": {"labels_to_mask": ["PER"]}},
        {**settings, "tagger": {**settings["tagger"], "model": other}},
    ]
    for args in others:
        build = EncoderFactory(Component(import_path=PATH, args=args))
        with pytest.raises(ArtifactError, match="made by encoder"):
            search_corpus(tmp_path / "1", queries, build, search, tmp_path / "refused", use_ray=False)
    stamp = open_artifact(tmp_path / "1", kind="index").manifest.details["encoder_version"]
    assert stamp == EncoderFactory(method)().version


def test_a_masked_corpus_is_kept_for_the_next_encoder(news, settings, tmp_path, encoder_folder):
    method = Component(import_path=PATH, args=settings)
    other = Component(import_path=PATH, args={**settings, "max_passage_tokens": 8})
    config = PreprocessConfig(passages_per_block=4)
    ready, build = preprocessed_corpus(news, method, config, tmp_path / "texts", use_ray=False)
    texts = {row["passage_id"]: row["text"] for table in ready.passages() for row in table.to_pylist()}
    assert texts["a1"] == "[MASK] saw the fire in [MASK] burn all night" and len(texts) == 6
    artifact = embed_corpus(ready, build, EmbedConfig(), tmp_path / "embed", use_ray=False, method=method)
    found, ids = EmbeddedCorpus.of(news.passage_files, 6, artifact).embeddings(0, 6)
    passages = [Passage(row["passage_id"], row["text"]) for table in news.passages() for row in table.to_pylist()]
    assert ids.to_pylist() == [passage.passage_id for passage in passages]
    assert found == pytest.approx(EncoderFactory(method)().encode_passages(passages), abs=1e-6)
    assert artifact.manifest.details["encoder_version"] == EncoderFactory(method)().version
    made = (tmp_path / "texts/manifest.json").stat().st_mtime_ns
    preprocessed_corpus(news, other, config, tmp_path / "texts", use_ray=False)
    assert (tmp_path / "texts/manifest.json").stat().st_mtime_ns == made
    # Nothing is kept of texts that are not changed.
    unmasked = Component(import_path=PATH, args={**settings, "masking": False})
    assert preprocessed_corpus(news, unmasked, config, tmp_path / "none", use_ray=False)[0] is news
    assert not (tmp_path / "none").exists()


@pytest.mark.ray
def test_a_corpus_is_masked_by_actors(news, settings, tmp_path, ray_cluster):
    method = Component(import_path=PATH, args=settings)
    config = PreprocessConfig(passages_per_block=2, num_workers=(1, 1))
    there, here = (
        preprocessed_corpus(news, method, config, tmp_path / str(use_ray), use_ray=use_ray)[0]
        for use_ray in (True, False)
    )
    assert [table.to_pylist() for table in there.passages()] == [table.to_pylist() for table in here.passages()]


@pytest.mark.ray
def test_tagger_and_encoder_are_trained_by_one_fit(tmp_path, ray_cluster, encoder_folder):
    """From marked texts and a corpus with stories to a method that masks; nothing is made twice."""
    import json

    marked = [{"tokens": ["Mary", "left", "London"], "tags": ["B-PER", "O", "B-LOC"]}] * 4
    (tmp_path / "marked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in marked))
    stories = [{"_id": str(n), "story": n // 2, "text": f"Mary told story {n // 2} in London"} for n in range(8)]
    (tmp_path / "news.jsonl").write_text("".join(json.dumps(row) + "\n" for row in stories))
    short = {"batch_size": 4, "max_steps": 2, "worker_cpus": 0.5, "log_every": 1}
    training = {"model": encoder_folder, "max_tokens": 16, "sources": [{"path": str(tmp_path / "marked.jsonl")}]}
    args = {
        "model": encoder_folder,
        "backend": "torch",
        "precision": "float32",
        "num_threads": 1,
        "tagger_training": {**training, "train": short},
        "stories": {"max_distance": 2.0},
    }
    config = RunConfig(
        out=tmp_path / "out",
        data=DataConfig(path=str(tmp_path / "news.jsonl")),
        method=Component(import_path=PATH, args=args),
        train=TrainConfig(**short),
    )
    method = Component.model_validate(train(config).manifest.details["method"])
    assert method.args["tagger"]["model"].endswith("tagger/train/model") and method.args["tagger_training"] is None
    assert method.args["model"].endswith("out/train/model")
    check_encoder(build_method(method).encoder())
    times = {file: file.stat().st_mtime_ns for file in (tmp_path / "out").rglob("manifest.json")}
    names = {file.parent.relative_to(tmp_path / "out").as_posix() for file in times}
    assert {"tagger/train", "preprocessed", "base/index", "examples", "examples_masked", "train", "method"} <= names
    train(config)
    assert {file: file.stat().st_mtime_ns for file in times} == times
