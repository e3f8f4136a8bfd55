"""A bounded prefix gives exactly the tokens of the whole text, whatever the text and the tokenizer."""

import json
import time

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from raydr.encoders.checkpoint import locate
from raydr.encoders.tokenization import BoundedTokenizer, is_local, load_tokenizer
from raydr.errors import ConfigError

GPT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SAMPLE = [
    "the quick brown fox, jumps over 12 lazy dogs!\n\n  naïve café – 東京都 and\tso   on",
    "aaa aa a b bb ab abc",
] * 3
ALPHABET = "ab çé\u0301ßΣİ1.,!?-\n\t\u00a0\u2003\u200b\u00b4\u3000東京都🙂\x00\x1f    "
TEXTS = st.lists(
    st.one_of(
        st.text(alphabet=ALPHABET, max_size=40),
        st.sampled_from(
            ["[SEP]", "[CLS]", "[UNK]", "</s>", "word " * 30, "a" * 120, " " * 50, "\n \n", "don't ", " é"]
        ),
        st.text(max_size=20),
    ),
    max_size=12,
).map("".join)


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(GPT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        SAMPLE, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, special_tokens=["</s>"])
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 0)])
    return tokenizer


def metaspace() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Nmt(), normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.train_from_iterator(
        SAMPLE, trainers.UnigramTrainer(vocab_size=120, special_tokens=["<unk>", "</s>"], unk_token="<unk>")
    )
    return tokenizer


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, Tokenizer]:
    return {"wordpiece": load_tokenizer(locate("minilm"))[0], "byte_level": byte_level(), "metaspace": metaspace()}


@pytest.mark.parametrize("kind", ["wordpiece", "byte_level", "metaspace"])
@given(text=TEXTS, max_tokens=st.integers(3, 24))
@example(text="a" * 5000, max_tokens=5)
@example(text=" " * 5000, max_tokens=5)
@example(text="東京" * 2000, max_tokens=5)
@example(text="word " * 2000, max_tokens=24)
@example(text="wor d\n" * 2000, max_tokens=24)
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_equals_tokenising_the_whole_text(tokenizers, kind, text, max_tokens):
    # One character per token makes the prefix far too short at first, so the check and the doubling are exercised.
    whole = Tokenizer.from_str(tokenizers[kind].to_str())
    whole.enable_truncation(max_tokens)
    whole.no_padding()
    bounded = BoundedTokenizer(tokenizers[kind], max_tokens, characters_per_token=1)
    texts = [text, "short", text + " tail"]
    assert bounded.encode(texts) == [encoding.ids for encoding in whole.encode_batch(texts)]


@pytest.mark.parametrize("kind", ["wordpiece", "byte_level", "metaspace"])
def test_the_known_families_are_bounded(tokenizers, kind):
    assert is_local(json.loads(tokenizers[kind].to_str()))


def test_what_might_look_far_ahead_is_not_bounded(tokenizers):
    spec = json.loads(tokenizers["byte_level"].to_str())
    assert not is_local({**spec, "pre_tokenizer": None})
    assert not is_local({**spec, "pre_tokenizer": {"type": "Split", "pattern": {"Regex": r"\w+(?=.*z)"}}})
    assert not is_local({**spec, "added_tokens": [{"content": "two words"}]})


def test_cost_does_not_grow_with_the_text(tokenizers):
    bounded = BoundedTokenizer(tokenizers["wordpiece"], 256)

    def seconds(text: str) -> float:
        times = []
        for _ in range(5):
            start = time.perf_counter()
            bounded.encode([text])
            times.append(time.perf_counter() - start)
        return min(times)

    page = "A sentence of plain English, again and again. " * 100
    # 200 times the text; tokenising all of it takes about 200 times as long. The bound leaves room for a busy machine.
    assert seconds(page * 200) < 10 * seconds(page)


def test_no_room_for_text(tokenizers):
    with pytest.raises(ConfigError, match="leaves no room beside 2 special tokens"):
        BoundedTokenizer(tokenizers["wordpiece"], 2)
