"""embed, index, search, serve and train on nodes that share a bucket and nothing else, losing a node on the way."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from raydr.evaluation.trec import read_run
from raydr.storage import bucket_of, place
from raydr.types import Hit
from raydr.verbs.config import RunConfig
from raydr.verbs.embed import embed
from raydr.verbs.index import index
from raydr.verbs.search import search
from tests.servers import free_port

REPOSITORY = Path(__file__).resolve().parent.parent.parent
NUM_PASSAGES = 400
WORDS = ["ray", "wheat", "moon", "compass", "piano", "faiss", "dog", "cat", "sun", "tide", "river", "stone", "glass"]


@pytest.fixture
def collection(tmp_path) -> Path:
    folder = tmp_path / "data"
    (folder / "qrels").mkdir(parents=True)
    texts = [f"number {n} {' '.join(WORDS[: 1 + n % 13])}" for n in range(NUM_PASSAGES)]
    corpus = [json.dumps({"_id": f"p{n}", "text": text}) for n, text in enumerate(texts)]
    (folder / "corpus.jsonl").write_text("\n".join(corpus), encoding="utf-8")
    queries = [json.dumps({"_id": f"q{n}", "text": f"number {n * 7}"}) for n in range(20)]
    (folder / "queries.jsonl").write_text("\n".join(queries), encoding="utf-8")
    rows = ["query-id\tcorpus-id\tscore", *(f"q{n}\tp{n * 7}\t1" for n in range(20))]
    (folder / "qrels/test.tsv").write_text("\n".join(rows), encoding="utf-8")
    return folder


@pytest.mark.ray
@pytest.mark.slow
def test_nodes_without_a_shared_disk(url, collection, tmp_path):
    script = REPOSITORY / "tests/storage/nodes_without_a_shared_disk.py"
    command = [sys.executable, str(script), url, str(collection), str(tmp_path / "caches"), str(free_port())]
    own = {**os.environ, "PYTHONPATH": str(REPOSITORY), "RAYDR_CACHE": str(tmp_path / "caches/driver")}
    done = subprocess.run(command, cwd=REPOSITORY, env=own, capture_output=True, text=True, timeout=1150)
    assert done.returncode == 0, done.stderr[-6000:]
    found = json.loads(done.stdout.splitlines()[-1])

    assert found["taken while embedding"]
    assert found["embedded"]["passages"] == NUM_PASSAGES
    assert found["indexed"] == {"passages": NUM_PASSAGES, "shards": 4}
    assert found["built on"] == {"node3": 4}  # as its label asks
    assert len(found["searched on"]) == 2  # an index may be larger than a node
    assert found["here"] == []  # workers wrote to the bucket and read from it
    (tmp_path / "run.trec").write_text(found["run"])
    here, expected = read_run(tmp_path / "run.trec"), expected_run(collection, tmp_path / "alone")
    served = {f"q{n}": [Hit(*hit) for hit in hits] for n, hits in enumerate(found["served"])}
    for query, hits in expected.items():
        for found_hits in (here[query], served[query]):
            assert [hit.passage_id for hit in found_hits[:3]] == [hit.passage_id for hit in hits[:3]]
            np.testing.assert_allclose([h.score for h in found_hits], [h.score for h in hits], atol=1e-5)

    assert found["taken while training"]
    assert found["steps"] == 40
    assert "model/model.safetensors" in found["model"]
    left = bucket_of(place(f"{url}/train"))
    assert left is not None
    assert set(left.sizes()) == {*found["model"], "manifest.json"}  # nothing of Ray Train's own stays behind


def expected_run(collection: Path, out: Path):
    """The same on a local disk, in one process."""
    settings = {
        "out": str(out),
        "runtime": "local",
        "data": {"path": str(collection), "split": "test"},
        "method": {"import_path": "raydr.methods.zero_shot:ZeroShot", "args": {"precision": "float32"}},
        "index": {"num_shards": 4, "factory": "IVF4,Flat", "bm25": {}},
        "search": {"k": 10, "mode": "hybrid"},
    }
    run = RunConfig.model_validate(settings)
    embed(run)
    index(run)
    return read_run(search(run).path / "run.trec")
