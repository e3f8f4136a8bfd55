"""What every method inherits: preprocessing in front of the encoder, building from configuration, defaults."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Sequence

import numpy as np
import pytest

from raydr.config import Component, Config
from raydr.encoders.factory import EncoderFactory
from raydr.errors import ConfigError
from raydr.methods.base import Method, build_method
from raydr.types import Passage, Query


class LengthEncoder:
    """One dimension: the number of characters, so that preprocessing shows."""

    dim = 1
    version = "length"

    def encode_queries(self, queries: Sequence[Query]) -> np.ndarray:
        return np.array([[len(q.text)] for q in queries], dtype=np.float32).reshape(-1, 1)

    def encode_passages(self, passages: Sequence[Passage]) -> np.ndarray:
        return np.array([[len(p.text)] for p in passages], dtype=np.float32).reshape(-1, 1)


class Shouting(Method):
    class Config(Config):
        marks: int = 1

    def build_encoder(self) -> LengthEncoder:
        return LengthEncoder()

    def preprocess_queries(self, queries: Sequence[Query]) -> list[Query]:
        return [query._replace(text=query.text + "!" * self.config.marks) for query in queries]


class Plain(Method):
    def build_encoder(self) -> LengthEncoder:
        return LengthEncoder()


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "base_methods", sys.modules[__name__])


def test_preprocessing_stands_in_front_of_the_encoder():
    encoder = Shouting(Shouting.Config(marks=3)).encoder()
    assert encoder.encode_queries([Query("q", "ab")]).tolist() == [[5.0]]
    assert encoder.encode_passages([Passage("p", "ab")]).tolist() == [[2.0]]
    assert (encoder.dim, encoder.version) == (1, "length")


def test_without_preprocessing_texts_pass_unchanged():
    encoder = Plain(Config()).encoder()
    assert encoder.encode_queries([Query("q", "abc")]).tolist() == [[3.0]]
    assert encoder.encode_passages([]).shape == (0, 1)


def test_the_parts_a_method_does_not_change_are_absent():
    method = Plain(Config())
    assert method.build_refiner(LengthEncoder()) is None
    assert method.build_reranker() is None


def test_a_method_is_built_from_its_import_path_and_args():
    method = build_method(Component(import_path="base_methods:Shouting", args={"marks": 2}))
    assert isinstance(method, Shouting)
    assert method.config.marks == 2


def test_arguments_are_checked_by_the_methods_own_schema():
    with pytest.raises(ConfigError, match="did you mean 'marks'"):
        build_method(Component(import_path="base_methods:Shouting", args={"mark": 2}))


@pytest.mark.parametrize("build", [build_method, lambda component: EncoderFactory(component)()])
def test_what_is_no_method_is_refused(build):
    with pytest.raises(ConfigError, match="is not a raydr Method"):
        build(Component(import_path="base_methods:LengthEncoder"))


def test_the_encoder_factory_travels_as_configuration():
    factory = EncoderFactory(Component(import_path="base_methods:Shouting", args={"marks": 4}))
    travelled = pickle.loads(pickle.dumps(factory))
    assert travelled == factory
    assert travelled().encode_queries([Query("q", "")]).tolist() == [[4.0]]


def test_a_method_must_say_how_it_encodes():
    class Silent(Method):
        pass

    with pytest.raises(TypeError, match="build_encoder"):
        Silent(Config())
