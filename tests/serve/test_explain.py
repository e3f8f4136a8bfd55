"""`/v1/search` over an index of sparse embeddings: the hits of batch search, and why each was found."""

from pathlib import Path

import pytest
from tiny_pictures import build_pictures, picture, sent
from tiny_serving import ANIMALS, check_error

from raydr.config import Component
from raydr.encoders.factory import EncoderFactory
from raydr.index.reader import IndexReader
from raydr.types import Query

QUERY = "a pet that hunts mice"


@pytest.fixture(scope="module")
def vdr(tmp_path_factory) -> Path:
    """The animals by an untrained VDR out of the packaged MiniLM, in two shards."""
    from raydr.config import validate
    from raydr.verbs import embed, index
    from raydr.verbs.config import RunConfig

    folder = tmp_path_factory.mktemp("explain")
    rows = [f'{{"_id": "{id_}", "title": "{title}", "text": "{text}", "kind": "{kind}"}}\n'
            for id_, (title, text, kind, _) in ANIMALS.items()]  # fmt: skip
    (folder / "corpus.jsonl").write_text("".join(rows), encoding="utf-8")
    args = {"towers": "one", "query_topk": 64, "passage_topk": 64, "num_threads": 1, "precision": "float32"}
    method = {"import_path": "raydr.methods.vdr:Vdr", "args": args}
    config = {"out": folder / "out", "runtime": "local", "data": {"path": str(folder)}, "index": {"num_shards": 2}}
    run = validate(RunConfig, {**config, "method": method}, where="this test")
    embed.embed(run)
    return index.index(run).path


@pytest.fixture(scope="module")
def sparse(serve_in_process, vdr):
    return serve_in_process(index=vdr)


def test_the_hits_are_those_of_the_index(sparse, vdr):
    answer = sparse.post("/v1/search", json={"queries": [QUERY, "honey"], "k": 4}).json()
    reader = IndexReader.open(vdr)
    encoder = EncoderFactory(reader.method)()
    top = reader.search(encoder.encode_queries([Query("0", QUERY), Query("1", "honey")]), 4)
    for line, result in enumerate(answer["results"]):
        found = top.rows[line] >= 0
        assert [hit["id"] for hit in result["hits"]] == reader.passage_ids.take(top.rows[line][found]).tolist()
        assert [hit["score"] for hit in result["hits"]] == pytest.approx(top.scores[line][found].tolist(), rel=1e-4)
        assert all("explanation" not in hit for hit in result["hits"])
    filtered = sparse.post("/v1/search", json={"query": QUERY, "filters": {"kind": "wild"}}).json()
    assert {hit["id"] for hit in filtered["hits"]} == {"owl", "whale"}


def test_what_is_explained_adds_up_to_the_score(sparse, vdr):
    answer = sparse.post("/v1/search", json={"query": QUERY, "k": 6, "explain": True, "fields": []}).json()
    assert len(answer["hits"]) == 6
    reader = IndexReader.open(vdr)
    inner = EncoderFactory(reader.method)().inner  # pyrefly: ignore
    query = dict(zip(*words_of(inner, inner.encode_queries([Query("q", QUERY)])), strict=True))
    for hit in answer["hits"]:
        why = hit["explanation"]
        shares = {match["token"]: match["weight"] for match in why["matches"]}
        assert sum(shares.values()) + why["rest"] == pytest.approx(why["score"], rel=1e-5)
        assert why["score"] == pytest.approx(hit["score"], rel=1e-4)
        row = next(iter(reader.rows_of([hit["id"]]).values()))
        passage = dict(zip(*words_of(inner, reader.embeddings(row)), strict=True))
        for token, share in shares.items():
            assert share == pytest.approx(query[token] * passage[token], rel=1e-4)
        for word in why["passage"]:
            assert word["weight"] == pytest.approx(passage[word["token"]], rel=1e-4)
        assert why["passage"][0]["weight"] == pytest.approx(max(passage.values()), rel=1e-4)
    assert answer["timings_ms"]["explain"] > 0


def words_of(encoder, embeddings):
    return encoder.tokens_of(embeddings.indices), embeddings.data.tolist()


def test_hybrid_explains_its_side_of_embeddings(sparse):
    body = {"query": QUERY, "k": 3, "mode": "hybrid", "explain": True}
    for hit in sparse.post("/v1/search", json=body).json()["hits"]:
        assert hit["explanation"]["score"] > hit["score"]  # which is of ranks


def test_what_cannot_be_done_is_refused(sparse, client):
    check_error(client.post("/v1/search", json={"query": "x", "explain": True}), 422, "invalid_value", "explain")
    body = {"query": "x", "explain": True, "mode": "bm25"}
    check_error(sparse.post("/v1/search", json=body), 422, "invalid_value")
    check_error(sparse.post("/v1/embeddings", json={"input": "x"}), 422, "invalid_value", "input")
    body = {"query": "x", "feedback": {"scores": "any"}}
    check_error(sparse.post("/v1/search", json=body), 422, "invalid_value", "feedback")


def test_the_list_of_models_says_what_can_be_explained(sparse, client):
    for served, expected in ((sparse, True), (client, False)):
        (card,) = served.get("/v1/models").json()["data"]
        assert card["explains"] is expected


def test_a_picture_is_found_by_words_and_says_which(serve_in_process, tmp_path):
    """Passages that are pictures, in one vocabulary with texts; and a picture as the query."""
    from tests.encoders.test_multimodal import checkpoint

    model = str(checkpoint("vision-text-dual-encoder", tmp_path / "dual"))
    args = {"model": model, "query_topk": 32, "passage_topk": None, "num_threads": 1, "precision": "float32"}
    method = Component(import_path="raydr.methods.vdr:VdrPictures", args={**args, "device": "cpu"})
    client = serve_in_process(index=build_pictures(tmp_path / "index", method))
    asked = {"query": "a red rose", "k": 6, "explain": True}
    hits = client.post("/v1/search", json=asked).json()["hits"]
    assert len(hits) == 6
    red = next(hit for hit in hits if hit["id"] == "red")["explanation"]
    assert len(red["passage"]) > 1 and red["passage"][0]["weight"] > red["passage"][-1]["weight"] > 0
    shares = sum(match["weight"] for match in red["matches"])
    assert shares + red["rest"] == pytest.approx(red["score"], rel=1e-4)
    by_picture = client.post("/v1/search", json={"image": sent(picture("red")), "k": 6, "explain": True}).json()["hits"]
    assert by_picture[0]["id"] == "red" and by_picture[0]["explanation"]["matches"]
