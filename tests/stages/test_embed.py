"""embed: both runtimes give one table, interrupted runs resume, what changes no vector makes no new artifact."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raydr.artifacts import open_artifact
from raydr.config import Component
from raydr.data.config import DataConfig
from raydr.data.corpus import Corpus
from raydr.data.ingest import ingest
from raydr.encoders.factory import EncoderFactory
from raydr.errors import ArtifactError, DataError
from raydr.stages.config import EmbedConfig
from raydr.stages.embed import check_complete, embed_corpus
from raydr.stages.embed_on_ray import CHECKPOINTS, embed_stage
from raydr.types import EMBEDDING, PASSAGE_ID, POSITION, Passage
from tests.corpora import METHOD

ZERO_SHOT = Component(import_path="raydr.methods.zero_shot:ZeroShot", args={"precision": "float32"})
NUM_PASSAGES = 60


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Corpus:
    folder = tmp_path_factory.mktemp("corpus")
    words = ["ray", "wheat", "moon", "compass", "piano", "faiss", "dog", "cat", "sun", "tide"]
    rows = [
        f'{{"_id": "p{i}", "title": "T{i}", "text": "{" ".join(words[: 1 + i % 10] * (1 + i % 7))}"}}'
        for i in range(NUM_PASSAGES)
    ]
    (folder / "corpus.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return ingest(DataConfig(path=str(folder)), folder / "out")


def embed(corpus, out, *, use_ray=False, method=ZERO_SHOT, **settings):
    config = EmbedConfig(passages_per_block=8, **settings)
    return embed_corpus(corpus, EncoderFactory(method), config, out, use_ray=use_ray, method=method)


def table_of(out: Path):
    """passage ids and embeddings in the order of positions; every position must be there once."""
    tables = [pq.read_table(file) for file in (out / "embeddings").glob("*.parquet")]
    rows = [row for table in tables for row in table.to_pylist()]
    rows.sort(key=lambda row: row[POSITION])
    assert [row[POSITION] for row in rows] == list(range(len(rows)))
    return [row[PASSAGE_ID] for row in rows], np.array([row[EMBEDDING] for row in rows], dtype=np.float32)


def test_embeds_every_passage_in_its_place(corpus, tmp_path, capsys):
    artifact = embed(corpus, tmp_path / "embed")
    ids, embeddings = table_of(artifact.path)
    table = next(corpus.passages())
    encoder = EncoderFactory(ZERO_SHOT)()
    passages = [Passage(row["passage_id"], row["text"], row["title"]) for row in table.to_pylist()]
    assert ids == [passage.passage_id for passage in passages]
    np.testing.assert_allclose(embeddings, encoder.encode_passages(passages), atol=1e-5)
    details = artifact.manifest.details
    assert details["dim"] == 384
    assert details["encoder_version"] == encoder.version
    assert details["passages_per_s"] > 0
    assert details["num_tokens"] > NUM_PASSAGES
    assert 0 <= details["padding_share"] < 1
    field = pq.read_schema(next((artifact.path / "embeddings").glob("*.parquet"))).field(EMBEDDING)
    assert field.type.equals(pa.list_(pa.float32(), 384))
    assert "60 passages in" in capsys.readouterr().err


def test_a_finished_artifact_is_used_again_unless_the_vectors_would_differ(corpus, tmp_path, capsys):
    first = embed(corpus, tmp_path / "embed")
    faster = Component(import_path=ZERO_SHOT.import_path, args={**ZERO_SHOT.args, "batch_tokens": 64, "num_threads": 1})
    again = embed(corpus, tmp_path / "embed", method=faster, num_workers=(1, 2))
    assert again.manifest.created_at == first.manifest.created_at
    assert "has these embeddings already" in capsys.readouterr().err
    shorter = Component(import_path=ZERO_SHOT.import_path, args={**ZERO_SHOT.args, "dimensions": 32})
    other = embed(corpus, tmp_path / "embed", method=shorter)
    assert other.fingerprint != first.fingerprint
    assert other.manifest.details["dim"] == 32


def test_check_complete_names_the_position(corpus, tmp_path):
    folder = embed(corpus, tmp_path / "embed").path / "embeddings"
    check_complete(folder, NUM_PASSAGES)
    with pytest.raises(ArtifactError, match="position 60 is embedded 0 times"):
        check_complete(folder, NUM_PASSAGES + 1)
    with pytest.raises(ArtifactError, match="position 59 lies beyond the corpus"):
        check_complete(folder, NUM_PASSAGES - 1)
    part = sorted(folder.glob("*.parquet"))[0]
    pq.write_table(pq.read_table(part), folder / "copy.parquet")
    with pytest.raises(ArtifactError, match="position 0 is embedded 2 times"):
        check_complete(folder, NUM_PASSAGES)


@pytest.mark.ray
def test_ray_gives_the_same_table(ray_cluster, corpus, tmp_path):
    _, here = table_of(embed(corpus, tmp_path / "local").path)
    artifact = embed(corpus, tmp_path / "ray", use_ray=True, num_workers=(1, 1))
    ids, on_ray = table_of(artifact.path)
    np.testing.assert_allclose(on_ray, here, atol=1e-5)
    assert ids == [f"p{i}" for i in range(NUM_PASSAGES)]
    assert artifact.manifest.details["num_tokens"] == open_artifact(tmp_path / "local").manifest.details["num_tokens"]
    assert artifact.fingerprint == open_artifact(tmp_path / "local").fingerprint
    assert not (tmp_path / "ray" / CHECKPOINTS).exists()


@pytest.mark.ray
def test_the_stage_composes_and_checks_its_columns(ray_cluster):
    import ray

    stage = embed_stage(EncoderFactory(ZERO_SHOT), EmbedConfig(num_workers=(1, 1)))
    rows = [{"passage_id": f"p{i}", "position": i, "text": f"text number {i}"} for i in range(5)]
    embedded = stage(ray.data.from_items(rows)).take_all()
    expected = EncoderFactory(ZERO_SHOT)().encode_passages([Passage(row["passage_id"], row["text"]) for row in rows])
    got = np.array([row[EMBEDDING] for row in sorted(embedded, key=lambda row: row[POSITION])])
    np.testing.assert_allclose(got, expected, atol=1e-5)
    with pytest.raises(DataError, match="embed needs the column text; this table has body"):
        stage(ray.data.from_items([{"passage_id": "p", "position": 0, "body": "b"}]))


@pytest.mark.ray
@pytest.mark.parametrize(
    ("method", "counts_tokens"),
    [
        (Component.model_validate(METHOD), False),  # an encoder of one's own owes nobody a count
        (Component(import_path="raydr.methods.cross_encoder:CrossEncoderRanker", args={"retriever": ZERO_SHOT}), True),
    ],
    ids=["an encoder that counts nothing", "a ranker, which embeds with its retriever"],
)
def test_every_methods_encoder_embeds_on_ray(ray_cluster, corpus, tmp_path, method, counts_tokens):
    artifact = embed(corpus, tmp_path / "ray", method=method, use_ray=True, num_workers=(1, 1))
    _, here = table_of(embed(corpus, tmp_path / "local", method=method).path)
    np.testing.assert_allclose(table_of(artifact.path)[1], here, atol=1e-5)
    assert (artifact.manifest.details["num_tokens"] > 0) == counts_tokens


class Run:
    """embed in a process of its own, with a log of what was encoded."""

    def __init__(self, corpus: Corpus, out: Path, log: Path, *, use_ray: bool, sleep_s: float) -> None:
        program = textwrap.dedent(
            f"""
            import sys
            from pathlib import Path
            from raydr.config import Component
            from raydr.data.corpus import Corpus
            from raydr.encoders.factory import EncoderFactory
            from raydr.stages.config import EmbedConfig
            from raydr.stages.embed import embed_corpus

            use_ray = {use_ray}
            if use_ray:
                import ray
                ray.init(address="local", num_cpus=2, include_dashboard=False, object_store_memory=200_000_000)
            method = Component(import_path="logging_method:LoggingMethod", args={{"precision": "float32"}})
            config = EmbedConfig(passages_per_block=4, num_workers=(1, 1))
            embed_corpus(Corpus.open({str(corpus.path)!r}), EncoderFactory(method), config, Path({str(out)!r}),
                         use_ray=use_ray, method=method)
            """
        )
        environment = os.environ | {
            "PYTHONPATH": str(Path(__file__).parent),
            "ENCODE_LOG": str(log),
            "ENCODE_SLEEP_S": str(sleep_s),
        }
        log.touch()
        self.log = log
        self.process = subprocess.Popen(
            [sys.executable, "-c", program],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def kill_after(self, num_blocks: int) -> None:
        """SIGKILL for the driver and everything it started, once that many blocks are encoded."""
        deadline = time.monotonic() + 500
        while len(self.encoded()) < num_blocks:
            assert self.process.poll() is None, self.process.communicate()[0]
            assert time.monotonic() < deadline, "nothing was embedded in time"
            time.sleep(0.02)
        self.kill()
        self.process.communicate()

    def kill(self) -> None:
        family = [*psutil.Process(self.process.pid).children(recursive=True), psutil.Process(self.process.pid)]
        for member in family:
            try:
                member.send_signal(signal.SIGKILL)
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs(family, timeout=30)

    def finish(self) -> str:
        try:
            output, _ = self.process.communicate(timeout=500)
        except subprocess.TimeoutExpired:
            self.kill()
            raise
        assert self.process.returncode == 0, output
        return output

    def encoded(self) -> list[list[str]]:
        return [line.split() for line in self.log.read_text(encoding="utf-8").splitlines()]


def finished_positions(out: Path, *, use_ray: bool) -> set[int]:
    """What a killed run had finished: files renamed into place, or on Ray the checkpoints that were committed."""
    folder = out / CHECKPOINTS if use_ray else out / "embeddings"
    files = [file for file in folder.glob("*.parquet") if not file.name.endswith(".pending.parquet")]
    return {position for file in files for position in pq.read_table(file, columns=[POSITION])[POSITION].to_pylist()}


@pytest.mark.slow
@pytest.mark.parametrize("use_ray", [False, pytest.param(True, marks=pytest.mark.ray)])
def test_resumes_after_a_kill(corpus, tmp_path, use_ray):
    """No finished block is embedded twice, nothing is lost, and the result is that of an uninterrupted run."""
    out = tmp_path / "embed"
    first = Run(corpus, out, tmp_path / "first.log", use_ray=use_ray, sleep_s=0.4)
    first.kill_after(num_blocks=6)
    with pytest.raises(ArtifactError, match="did not finish"):
        open_artifact(out)
    finished = {f"p{position}" for position in finished_positions(out, use_ray=use_ray)}
    assert 0 < len(finished) < NUM_PASSAGES, "the kill must fall midway for this test to say anything"

    second = Run(corpus, out, tmp_path / "second.log", use_ray=use_ray, sleep_s=0)
    output = second.finish()
    embedded_again = [passage_id for block in second.encoded() for passage_id in block]
    assert len(embedded_again) == len(set(embedded_again))
    assert set(embedded_again) == {f"p{i}" for i in range(NUM_PASSAGES)} - finished
    assert f"({len(finished)} were there already)" in output

    ids, resumed = table_of(out)
    _, whole = table_of(embed(corpus, tmp_path / "whole").path)
    assert ids == [f"p{i}" for i in range(NUM_PASSAGES)]
    np.testing.assert_allclose(resumed, whole, atol=1e-5)
    open_artifact(out, kind="embeddings").verify()


def test_the_other_runtimes_leftovers_are_not_trusted(corpus, tmp_path, capsys):
    """Half a file of an interrupted run on Ray must not end in a local run's artifact."""
    out = tmp_path / "embed"

    class Interrupted(Exception):
        pass

    class Breaks:
        dim, version = 384, EncoderFactory(ZERO_SHOT)().version

        def encode_passages(self, passages):
            raise Interrupted

    with pytest.raises(Interrupted):
        embed_corpus(corpus, Breaks, EmbedConfig(), out, use_ray=False, method=ZERO_SHOT)
    (out / CHECKPOINTS).mkdir()
    (out / "embeddings" / "half.parquet").write_bytes(b"PAR1 half a file")
    embed(corpus, out)
    assert "starting over" in capsys.readouterr().err
    assert len(table_of(out)[0]) == NUM_PASSAGES
