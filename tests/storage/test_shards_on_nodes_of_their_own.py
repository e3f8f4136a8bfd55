"""serve_configs/spread.yaml: each shard deployment on a node of its own, which holds its shards and no others."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from raydr.verbs.config import RunConfig
from raydr.verbs.embed import embed
from raydr.verbs.index import index
from tests.servers import free_port

REPOSITORY = Path(__file__).resolve().parents[2]
WORDS = ["mice", "night", "sea", "milk", "honey", "house", "bird", "insect", "grass", "air", "hive", "stone", "glass"]


@pytest.mark.ray
@pytest.mark.slow
def test_an_index_is_served_from_nodes_that_each_hold_a_part_of_it(url, tmp_path):
    (tmp_path / "data").mkdir()
    rows = [json.dumps({"_id": word, "text": f"a text that speaks of {word}"}) for word in WORDS]
    (tmp_path / "data/corpus.jsonl").write_text("\n".join(rows), encoding="utf-8")
    settings = {"out": url, "runtime": "local", "data": {"path": str(tmp_path / "data")}, "index": {"num_shards": 4}}
    run = RunConfig.model_validate(settings)
    embed(run)
    built = index(run)
    sizes = [record["num_rows"] for record in built.manifest.details["shards"]]

    script = REPOSITORY / "tests/storage/shards_on_nodes_of_their_own.py"
    command = [sys.executable, str(script), f"{url}/index", str(tmp_path / "caches"), str(free_port())]
    quick = {"RAY_health_check_period_ms": "1000", "RAY_health_check_failure_threshold": "2"}  # a dead node is noticed
    own = {**os.environ, **quick, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, cwd=REPOSITORY, env=own, capture_output=True, text=True, timeout=1150)
    assert done.returncode == 0, done.stderr[-6000:]
    found = json.loads(done.stdout.splitlines()[-1])
    print({name: value for name, value in found.items() if name.endswith("after")})

    here, there = ["0", "2"], ["1", "3"]  # j % 2
    assert found["brought"] == {"front": [], "a": here, "b": there, "c": []}
    assert found["mapped"] == {"Ingress": [], "Encoder": [], "Shard0": here, "Shard1": there}
    whole = [hit["id"] for hit in found["whole"]["hits"]]
    assert sorted(whole) == sorted(WORDS)

    assert found["error"] == [503, "shard_timeout", "2"]
    starts = [sum(sizes[:number]) for number in range(5)]
    held = {word for shard in (0, 2) for word in WORDS[starts[shard] : starts[shard + 1]]}
    for answer in (found["partial"], found["partial without the node"]):
        assert answer["partial"] is True
        missing = {shard["shard"]: shard["num_passages"] for shard in answer["missing_shards"]}
        assert missing == {1: sizes[1], 3: sizes[3]}
        assert [hit["id"] for hit in answer["hits"]] == [id_ for id_ in whole if id_ in held]
    assert [hit["id"] for hit in found["whole again"]["hits"]] == whole
    assert found["brought by the new node"] == there
