"""Every method has its line in docs/papers.md, a config that can be run, and a test; configs have the right values."""

import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import raydr.methods
from raydr.config import Component, Config, load
from raydr.methods.base import Method
from raydr.verbs.config import RunConfig

REPOSITORY = Path(__file__).parents[2]
CONFIGS = sorted((REPOSITORY / "jobs/configs").glob("*.yaml"))


def methods() -> list[type[Method]]:
    names = [found.name for found in pkgutil.iter_modules(raydr.methods.__path__) if found.name != "base"]
    modules = [importlib.import_module(f"raydr.methods.{name}") for name in names]
    classes = {
        value
        for module in modules
        for value in vars(module).values()
        if inspect.isclass(value) and issubclass(value, Method) and value.__module__ == module.__name__
    }
    return sorted(classes, key=lambda method: method.__qualname__)


def path_of(method: type[Method]) -> str:
    return f"{method.__module__}:{method.__qualname__}"


def config_of(name: str) -> RunConfig:
    return load(RunConfig, REPOSITORY / f"jobs/configs/{name}.yaml", ["data.path=somewhere"])


def opening(file: Path) -> str:
    """The comment at the top of a config."""
    return file.read_text().partition("\nout:")[0]


def built(component: Component) -> Iterator[Any]:
    """What a component builds, and what the components among its settings build; reads no checkpoint."""
    made = component.build()
    yield made
    if isinstance(settings := getattr(made, "config", None), Config):
        for name in type(settings).model_fields:
            if isinstance(inner := getattr(settings, name), Component):
                yield from built(inner)


@pytest.fixture(scope="module")
def table() -> dict[str, list[str]]:
    """Import path -> configs, as docs/papers.md says."""
    text = (REPOSITORY / "docs/papers.md").read_text()
    rows = re.findall(r"\| `(raydr\.methods[\w.:]+)` \| (.*) \|$", text, re.M)
    return {path: re.findall(r"`([\w.]+\.yaml)`", configs) for path, configs in rows}


def test_the_table_names_every_method_and_nothing_else(table):
    assert sorted(table) == sorted(map(path_of, methods()))


@pytest.mark.parametrize("method", methods(), ids=path_of)
def test_a_method_has_a_config_and_a_test(method, table):
    assert table[path_of(method)]
    for name in table[path_of(method)]:
        assert (REPOSITORY / "jobs/configs" / name).is_file()
    files = [file for file in (REPOSITORY / "tests").rglob("test_*.py") if file != Path(__file__)]
    tests = "\n".join(file.read_text() for file in files)
    assert method.__module__ in tests


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.name)
def test_a_config_is_valid_and_its_method_can_be_built(file, table):
    config = config_of(file.stem)
    assert all(isinstance(made, Method) for made in built(config.method))
    assert file.name.replace("_small.yaml", ".yaml") in {name for names in table.values() for name in names}
    assert f"jobs/configs/{file.name}" in opening(file), "the comment at its top says how it is run"


@pytest.mark.parametrize("file", [file for file in CONFIGS if not file.stem.endswith("_small")], ids=lambda f: f.name)
def test_a_trained_config_has_a_small_variant_or_says_why_not(file):
    config, small = config_of(file.stem), file.with_name(f"{file.stem}_small.yaml")
    if config.train is None:
        return
    assert f"`{small.name}`" in opening(file) or "There is no `_small` variant" in opening(file)
    assert small.is_file() == (f"`{small.name}`" in opening(file))
    if small.is_file():
        assert config_of(small.stem).method.import_path == config.method.import_path


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.name)
def test_what_stops_by_the_dev_split_has_one_and_the_small_say_how_to_set_it(file):
    config = config_of(file.stem)
    if config.train is not None and config.train.patience:
        assert config.mine.dev_split is not None
    if file.stem.endswith("_small"):
        assert config.mine.dev_split is None, "SciFact has none, and a split that is not there is an error"
        assert "mine.dev_split=dev" in opening(file)


PAPERS: dict[str, dict[str, Any]] = {
    "ar2_warmup_retriever": {  # table 8, G0 for NQ
        "method": {
            "pooling": "cls",
            "normalize": False,
            "temperature": 1.0,
            "num_negatives": 1,
            "max_query_tokens": 32,
            "max_passage_tokens": 128,
        },
        "train": {"batch_size": 128, "learning_rate": 1e-5, "schedule": "linear", "warmup_share": 0.1},
        "mine": {"sources": ("bm25",)},
    },
    "cross_encoder": {  # table 8, D0 for NQ
        "method": {"loss": "listwise", "num_negatives": 15, "max_pair_tokens": 160},
        "train": {"batch_size": 64, "learning_rate": 1e-5, "max_steps": 2000, "warmup_share": 0.1},
        "mine": {"sources": ("model",), "last_rank": 100, "num_negatives": 100},
    },
    "ar2": {  # table 8, G and D for NQ; section 4.2
        "method": {
            "pooling": "cls",
            "normalize": False,
            "score_scale": 1.0,
            "num_negatives": 15,
            "rounds": 10,
            "retriever_steps": 1500,
            "ranker_steps": 500,
            "ranker_learning_rate": 1e-6,
            "ranker_warmup_steps": 2000,
            "ranker_warmup_learning_rate": 1e-5,
            "ranker_temperature": 1.0,
            "adv_lambda": 0.5,
        },
        "train": {"batch_size": 64, "learning_rate": 1e-5, "max_steps": 15000, "warmup_share": 0.1, "clip_norm": 2.0},
        "mine": {"sources": ("model",), "last_rank": 100, "num_negatives": 100},
    },
    "mw": {  # section 5.1, appendix B
        "method": {"temperature": 0.01, "num_negatives": 5, "normalize": True},
        "train": {"batch_size": 64, "learning_rate": 3e-5, "max_steps": 20 * 87599 // 64 + 1},
        "mine": {"num_negatives": 5, "dev_split": "dev"},
    },
    "tas_balanced": {  # sections 4.1 to 4.3
        "method": {
            "pooling": "cls",
            "normalize": False,
            "max_query_tokens": 30,
            "max_passage_tokens": 200,
            "num_clusters": 2000,
            "clusters_per_batch": 1,
            "num_bins": 10,
            "pairwise_weight": 1.0,
            "in_batch_weight": 0.75,
            "colbert_learning_rate": 7e-6,
        },
        "train": {
            "batch_size": 32,
            "learning_rate": 7e-6,
            "weight_decay": 0.0,
            "schedule": "cosine",
            "schedule_steps": 850000,
            "metric": "nDCG@10",
            "evaluate_every": 4000,
            "patience": 30,
        },
        "mine": {},
    },
    "news_deja_vu": {  # model card of dell-research-harvard/same-story
        "method": {"margin": 0.5, "num_negatives": 1, "masking": True},
        "train": {
            "batch_size": 16,
            "max_steps": 9 * 806,
            "warmup_share": 0.39,
            "evaluate_every": 320,
            "clip_norm": 1.0,
        },
        "mine": {"dev_split": "dev"},
    },
    "vdr": {  # github.com/jzhoubu/vsearch, conf/train/vdr_nq.yaml and conf/biencoder/vdr.yaml; vdr-nq's path name
        "method": {
            "semi": False,
            "towers": "two",
            "query_topk": 768,
            "passage_topk": 768,
            "train_topk": 768,
            "max_query_tokens": 128,
            "max_passage_tokens": 256,
            "contrastive_mask": False,
            "sides": "sum",
            "num_negatives": 1,
        },
        "train": {
            "batch_size": 256,
            "learning_rate": 2e-5,
            "schedule": "linear",
            "weight_decay": 0.0,
            "clip_norm": 2.0,
        },
        "mine": {"sources": ("bm25",)},
    },
    "colbert": {  # arXiv 2004.12832, section 4.1
        "method": {"dimensions": 128, "normalize": True, "max_query_tokens": 32, "num_negatives": 1},
        "train": {"batch_size": 32, "learning_rate": 3e-6, "max_steps": 200000, "schedule": "constant"},
        "mine": {"sources": ("bm25",)},
    },
}
"""What the papers say, written down a second time."""


@pytest.mark.parametrize("name", PAPERS)
def test_a_papers_config_has_the_papers_values(name):
    config = config_of(name)
    parts = {"method": config.method.build().config, "train": config.train, "mine": config.mine}
    for part, values in PAPERS[name].items():
        assert {field: getattr(parts[part], field) for field in values} == values


@pytest.mark.parametrize(("name", "steps"), [("tas_balanced", 100), ("mw", 500)])
def test_a_warmup_given_in_steps_has_so_many(name, steps):
    train = config_of(name).train
    assert train is not None
    assert train.learning_rate_at(steps - 1) == train.learning_rate
    assert train.learning_rate_at(steps - 2) < train.learning_rate


@pytest.mark.parametrize("name", ["ar2", "cross_encoder"])
def test_ar2_begins_with_the_retriever_that_its_warmup_leaves(name):
    warmup, config = config_of("ar2_warmup_retriever"), config_of(name)
    start = config.method.args if name == "ar2" else config.method.args["retriever"]["args"]
    used = ("pooling", "normalize", "max_query_tokens", "max_passage_tokens")
    assert start["model"] == str(warmup.out / "train/model")
    assert {key: start[key] for key in used} == {key: warmup.method.args[key] for key in used}
