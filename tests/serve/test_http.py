"""The HTTP contract, over a real index and a real encoder in this process: shapes, limits, errors."""

import base64

import numpy as np
import pytest
from tiny_serving import ANIMALS, check_error, with_details

from raydr.config import Component
from raydr.encoders.cross_encoder import CrossEncoderReranker, PairConfig, load_cross_encoder, save_cross_encoder
from raydr.encoders.factory import EncoderFactory
from raydr.index.reader import IndexReader
from raydr.serve.errors import ApiError
from raydr.types import Passage, Query
from tests.train.tiny import tiny_checkpoint

JSON = {"Content-Type": "application/json"}


def _search(client, **body):
    response = client.post("/v1/search", json=body)
    assert response.status_code == 200, response.text
    return response.json()


@pytest.fixture(scope="module")
def reader(animals):
    return IndexReader.open(animals)


@pytest.fixture(scope="module")
def encoder(reader):
    return EncoderFactory(reader.method)()


# --- search


def test_dense_search_is_the_readers(client, reader, encoder):
    queries = ["who hunts mice", "sea creature"]
    answer = _search(client, queries=queries, k=4)
    top = reader.search(encoder.encode_queries([Query("", text) for text in queries]), 4)
    assert [result["query"] for result in answer["results"]] == queries
    for result, scores, rows in zip(answer["results"], top.scores, top.rows, strict=True):
        assert [hit["id"] for hit in result["hits"]] == [reader.passage_ids[int(row)] for row in rows]
        assert [hit["score"] for hit in result["hits"]] == pytest.approx(scores.tolist(), abs=1e-6)
    assert "hits" not in answer


def test_bm25_search_is_the_readers(client, reader):
    answer = _search(client, query="animal at night", mode="bm25", k=3)
    top = reader.search_bm25(["animal at night"], 3)
    assert [hit["id"] for hit in answer["hits"]] == [reader.passage_ids[int(row)] for row in top.rows[0] if row >= 0]


def test_hybrid_search_fuses_both_sides(client, reader, encoder):
    from raydr.index.fusion import FusionConfig, fuse

    text = "animal at night"
    answer = _search(client, query=text, mode="hybrid", k=5)
    parts = [reader.search(encoder.encode_queries([Query("", text)]), 100), reader.search_bm25([text], 100)]
    fused = fuse(parts, FusionConfig(), 5, reader.passage_ids.take)
    assert [hit["id"] for hit in answer["hits"]] == [reader.passage_ids[int(row)] for row in fused.rows[0] if row >= 0]
    assert {"encode", "search", "bm25", "passages", "total"} <= set(answer["timings_ms"])


def test_a_hit_carries_its_passage(client, reader):
    answer = _search(client, query="hunts mice", k=2)
    assert answer["object"] == "search"
    assert answer["index_version"] == reader.version
    assert answer["model"] == "minilm"
    assert answer["timings_ms"]["total"] >= answer["timings_ms"]["encode"]
    assert {hit["id"] for hit in answer["hits"]} == {"cat", "owl"}
    for hit in answer["hits"]:
        title, text, kind, year = ANIMALS[hit["id"]]
        assert (hit["title"], hit["text"]) == (title, text)
        assert hit["metadata"] == {"kind": kind, "year": year}
        assert [text[start:end] for start, end in hit["highlights"]["text"]] == ["hunts", "mice"]


def test_fields_choose_what_a_hit_carries(client):
    assert set(_search(client, query="cat", fields=[])["hits"][0]) == {"id", "score"}
    assert set(_search(client, query="cat", fields=["title"])["hits"][0]) == {"id", "score", "title"}
    assert set(_search(client, query="cat", fields=["highlights"])["hits"][0]) == {"id", "score", "highlights"}


def test_many_hits_come_with_their_passages_too(client):
    """More than ride along with the shards' answers."""
    answer = _search(client, queries=["cat"] * 20, k=6)
    assert len(answer["results"]) == 20
    assert "passages" in answer["timings_ms"]
    for result in answer["results"]:
        assert {hit["id"]: hit["text"] for hit in result["hits"]} == {id_: row[1] for id_, row in ANIMALS.items()}


@pytest.mark.parametrize("mode", ["dense", "bm25", "hybrid"])
def test_filters_and_id_lists_hold_in_every_mode(client, mode):
    def found(**body):
        return {hit["id"] for hit in _search(client, query="animal insect bird", mode=mode, k=6, **body)["hits"]}

    assert found(filters={"kind": "farm"}) == {"cow", "bee"}
    assert found(filters={"kind": ["pet", "farm"], "year": {"gte": 2000, "lt": 2020}}) == {"cat", "dog"}
    assert found(filters={"kind": {"not": "farm"}}) <= {"cat", "dog", "owl", "whale"}
    assert found(allow_ids=["cow", "bee", "nobody"], exclude_ids=["cow"]) == {"bee"}
    assert found(allow_ids=[]) == set()


def test_a_filter_that_does_not_fit_names_its_column(client):
    response = client.post("/v1/search", json={"query": "x", "filters": {"colour": "red"}})
    error = check_error(response, 422, "invalid_filter", "filters.colour")
    assert "kind" in error["message"]
    for mode in ("dense", "bm25", "hybrid"):
        body = {"query": "x", "mode": mode, "filters": {"year": {"near": 3}}}
        check_error(client.post("/v1/search", json=body), 422, "invalid_filter", "filters.year")


def test_more_than_there_is_gives_what_there_is(client):
    assert len(_search(client, query="cat", k=500)["hits"]) == len(ANIMALS)


def test_an_unusual_query_is_only_a_query(client):
    for text in ["😀", "' OR 1=1 --", "<script>alert(1)</script>", "\u0000", "x" * 8000, "日本語", "{}", "\\"]:
        assert len(_search(client, query=text, k=1)["hits"]) == 1


# --- embeddings


@pytest.mark.parametrize(
    ("input_type", "side"), [("query", "query"), ("search_query", "query"), ("document", "passage")]
)
def test_embeddings_are_the_encoders(client, encoder, input_type, side):
    texts = ["first text", "a second, longer text"]
    answer = client.post("/v1/embeddings", json={"input": texts, "input_type": input_type}).json()
    if side == "query":
        expected = encoder.encode_queries([Query("", text) for text in texts])
    else:
        expected = encoder.encode_passages([Passage("", text) for text in texts])
    np.testing.assert_allclose([item["embedding"] for item in answer["data"]], expected, atol=1e-5)
    assert [item["index"] for item in answer["data"]] == [0, 1]
    assert answer["model"] == "minilm"


def test_base64_is_little_endian_float32(client):
    plain = client.post("/v1/embeddings", json={"input": "text"}).json()["data"][0]["embedding"]
    coded = client.post("/v1/embeddings", json={"input": "text", "encoding_format": "base64"}).json()["data"][0]
    decoded = np.frombuffer(base64.b64decode(coded["embedding"]), dtype="<f4")
    np.testing.assert_allclose(decoded, plain, atol=1e-6)


def test_token_ids_are_the_text_they_stand_for(client):
    from tokenizers import Tokenizer

    from raydr.encoders.checkpoint import open_checkpoint

    tokenizer = Tokenizer.from_file(str(open_checkpoint("minilm").path / "tokenizer.json"))
    tokenizer.no_padding()
    texts = ["the cat hunts mice", "a whale breathes"]
    ids = [tokenizer.encode(text).ids for text in texts]
    by_text = client.post("/v1/embeddings", json={"input": texts}).json()
    by_ids = client.post("/v1/embeddings", json={"input": ids}).json()
    assert by_ids["data"] == by_text["data"]
    single = client.post("/v1/embeddings", json={"input": ids[0]}).json()
    np.testing.assert_allclose(single["data"][0]["embedding"], by_text["data"][0]["embedding"], atol=1e-6)
    assert by_text["usage"] == {"prompt_tokens": sum(map(len, ids)), "total_tokens": sum(map(len, ids))}
    check_error(client.post("/v1/embeddings", json={"input": [10**8]}), 422, "invalid_value", "input")


def test_dimensions_keeps_a_normalised_prefix(client):
    whole = np.array(client.post("/v1/embeddings", json={"input": "text"}).json()["data"][0]["embedding"])
    short = np.array(
        client.post("/v1/embeddings", json={"input": "text", "dimensions": 64}).json()["data"][0]["embedding"]
    )
    np.testing.assert_allclose(short, whole[:64] / np.linalg.norm(whole[:64]), atol=1e-6)
    check_error(
        client.post("/v1/embeddings", json={"input": "t", "dimensions": 1000}), 422, "invalid_value", "dimensions"
    )


def test_usage_counts_what_is_read(client):
    long = client.post("/v1/embeddings", json={"input": "word " * 5000}).json()
    assert long["usage"]["prompt_tokens"] == 256  # the model's own maximum


def test_unknown_models_are_named(client):
    check_error(client.post("/v1/embeddings", json={"input": "x", "model": "gpt-9"}), 404, "model_not_found", "model")
    assert client.post("/v1/embeddings", json={"input": "x", "model": "minilm"}).status_code == 200


# --- rerank


def test_without_a_reranker_the_routes_say_so_after_checking_the_request(client):
    for path in ("/v1/rerank", "/v2/rerank"):
        response = client.post(path, json={"query": "q", "documents": ["a", {"text": "b"}], "model": "any"})
        assert "reranker" in check_error(response, 501, "reranker_not_configured")["message"]
        check_error(client.post(path, json={"query": "q", "documents": []}), 422, "invalid_value", "documents")
        check_error(client.post(path, json={"documents": ["a"]}), 422, "missing_field", "query")
    check_error(client.post("/rerank", json={"query": "q", "texts": ["a"]}), 501, "reranker_not_configured")
    check_error(client.post("/rerank", json={"query": "q"}), 422, "missing_field", "texts")


@pytest.mark.parametrize(
    "name", ["encoders.cross_encoder:CrossEncoderReranker", "methods.cross_encoder:CrossEncoderRanker"]
)
def test_a_trained_cross_encoder_answers_with_its_own_scores(serve_in_process, tmp_path, name):
    plain, model = str(tiny_checkpoint(tmp_path / "plain")), str(tmp_path / "ranker")
    (tmp_path / "ranker").mkdir()
    save_cross_encoder(load_cross_encoder(PairConfig(model=plain)), plain, tmp_path / "ranker")
    client = serve_in_process(
        rerankers={"ranker": Component(import_path=f"raydr.{name}", args={"model": model, "max_pair_tokens": 64})}
    )
    documents = ["a cat purrs", "a piano", "dogs bark at cats in the night", "a cat purrs"]
    body = {"query": "which animal purrs", "documents": documents}
    answer = client.post("/v1/rerank", json=body).json()
    ranker = CrossEncoderReranker(CrossEncoderReranker.Config(model=model, max_pair_tokens=64))
    query = Query("q", body["query"])
    expected = ranker.score([(query, Passage("p", text)) for text in documents])
    found = {result["index"]: result["relevance_score"] for result in answer["results"]}
    assert found == pytest.approx(dict(enumerate(expected.tolist())), abs=1e-4)
    order = [result["index"] for result in answer["results"]]
    assert order.index(0) < order.index(3)  # equal ones in the order of the request
    assert [found[place] for place in order] == sorted(found.values(), reverse=True)


def test_with_a_reranker_documents_come_best_first(serve_in_process):
    client = serve_in_process(rerankers={"lexical": Component(import_path="tiny_serving:LexicalReranker")})
    body = {"query": "a furry cat", "documents": ["the sea", {"text": "a furry animal"}, "a furry cat"], "top_n": 2}
    answer = client.post("/v2/rerank", json={**body, "return_documents": True}).json()
    assert [(item["index"], item["relevance_score"]) for item in answer["results"]] == [
        (2, 1.0),
        (1, pytest.approx(2 / 3)),
    ]
    assert answer["results"][0]["document"] == {"text": "a furry cat"}
    assert answer["model"] == "lexical"
    assert {"usage", "meta", "id"} <= set(answer)
    without = client.post("/v1/rerank", json=body).json()
    assert "document" not in without["results"][0]
    tei = client.post("/rerank", json={"query": "a cat", "texts": ["x", "a cat"], "return_text": True}).json()
    assert tei == [{"index": 1, "score": 1.0, "text": "a cat"}, {"index": 0, "score": 0.0, "text": "x"}]
    check_error(client.post("/v1/rerank", json={**body, "model": "other"}), 404, "model_not_found", "model")
    assert [card["id"] for card in client.get("/v1/models").json()["data"]] == ["minilm", "lexical"]


# --- what is wrong with a request


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        ({}, "invalid_value", None),
        ({"query": "x", "queries": ["y"]}, "invalid_value", None),
        ({"query": ""}, "invalid_value", "query"),
        ({"query": "  \n"}, "invalid_value", "query"),
        ({"query": 3}, "invalid_value", "query"),
        ({"queries": []}, "invalid_value", "queries"),
        ({"queries": ["a", 2]}, "invalid_value", "queries.1"),
        ({"queries": ["a", " "]}, "invalid_value", "queries"),
        ({"query": "x", "k": 0}, "invalid_value", "k"),
        ({"query": "x", "k": -1}, "invalid_value", "k"),
        ({"query": "x", "k": "10"}, "invalid_value", "k"),
        ({"query": "x", "k": 1.5}, "invalid_value", "k"),
        ({"query": "x", "k": True}, "invalid_value", "k"),
        ({"query": "x", "k": 10**30}, "limit_exceeded", "k"),
        ({"query": "x", "k": 1001}, "limit_exceeded", "k"),
        ({"query": "x", "mode": "sparse"}, "invalid_value", "mode"),
        ({"query": "x", "top_k": 3}, "unknown_field", "top_k"),
        ({"query": "x", "filters": ["kind"]}, "invalid_value", "filters"),
        ({"query": "x", "filters": {"kind": ["a"] * 1001}}, "limit_exceeded", "filters"),
        ({"query": "x", "exclude_ids": ["a"] * 10_001}, "limit_exceeded", "exclude_ids"),
        ({"query": "x", "allow_ids": [1]}, "invalid_value", "allow_ids.0"),
        ({"query": "x", "fields": ["score"]}, "invalid_value", "fields.0"),
        ({"query": "x" * 8193}, "limit_exceeded", "query"),
        ({"queries": ["x"] * 65}, "limit_exceeded", "queries"),
        ({"queries": ["x", "y" * 8193]}, "limit_exceeded", "queries.1"),
        ({"queries": ["x"] * 64, "k": 1000}, "limit_exceeded", "k"),
    ],
)
def test_faulty_searches_name_the_field(client, body, code, param):
    error = check_error(client.post("/v1/search", json=body), 422, code, param)
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"x",
        b"{",
        b'{"query": NaN}',
        b'{"query": "x", "filters": {"year": Infinity}}',
        b'{"query": "x", "k": -Infinity}',
        b"\xff\xfe\x00",
        b"[" * 200_000,
    ],
)
def test_what_is_not_json_is_refused(client, body):
    response = client.post("/v1/search", content=body, headers=JSON)
    assert response.status_code == (422 if body == b"" else 400)
    assert response.json()["error"]["code"] == ("missing_field" if body == b"" else "invalid_json")


def test_a_lone_surrogate_is_no_text(client):
    for path, body in [
        ("/v1/search", b'{"query": "\\ud800"}'),
        ("/v1/search", b'{"query": "x", "filters": {"kind": "\\udfff"}}'),
        ("/v1/search", b'{"query": "x", "exclude_ids": ["\\uD800"]}'),
        ("/v1/embeddings", b'{"input": ["\\ud800"]}'),
    ]:
        check_error(client.post(path, content=body, headers=JSON), 400, "invalid_json")
    assert client.post("/v1/search", content=b'{"query": "\\ud83d\\ude00"}', headers=JSON).status_code == 200


def test_faulty_embedding_inputs(client):
    for body in (
        {"input": []},
        {"input": ""},
        {"input": ["a", ""]},
        {"input": [[]]},
        {"input": ["a", 1]},
        {"input": [-1]},
    ):
        assert client.post("/v1/embeddings", json=body).status_code == 422, body
    check_error(client.post("/v1/embeddings", json={}), 422, "missing_field", "input")
    check_error(client.post("/v1/embeddings", json={"input": ["x"] * 257}), 422, "limit_exceeded", "input")
    check_error(client.post("/v1/embeddings", json={"input": "x", "encoding_format": "int8"}), 422, "invalid_value")
    assert client.post("/v1/embeddings", json={"input": "x", "unheard_of": 1}).status_code == 200


def test_routes_and_methods_that_do_not_exist(client):
    check_error(client.get("/nowhere"), 404, "not_found")
    check_error(client.post("/v1/nowhere", json={}), 404, "not_found")
    response = client.get("/v1/search")
    check_error(response, 405, "method_not_allowed")
    assert response.headers["Allow"] == "POST"


def test_only_json_is_read(client):
    for content_type in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""):
        response = client.post("/v1/search", content=b'{"query": "x"}', headers={"Content-Type": content_type})
        check_error(response, 415, "unsupported_media_type", "Content-Type")
    charset = {"Content-Type": "application/json; charset=utf-8"}
    assert client.post("/v1/search", content=b'{"query": "x"}', headers=charset).status_code == 200


# --- what describes the server


def test_models_say_what_is_served(client, reader):
    (card,) = client.get("/v1/models").json()["data"]
    assert card["id"] == "minilm"
    assert (card["dimensions"], card["num_passages"], card["num_shards"]) == (384, 6, 2)
    assert card["index_version"] == reader.version
    assert card["modes"] == ["dense", "bm25", "hybrid"]
    assert card["metadata_columns"] == ["kind", "year"]
    assert card["created"] > 1_500_000_000


def test_health_and_readiness(client, reader, serve_in_process):
    assert client.get("/health").json() == {"status": "ok"}
    assert client.get("/ready").json() == {"status": "ready", "index_version": reader.version}


def test_before_an_index_is_loaded_the_server_is_alive_but_not_ready(animals):
    from starlette.testclient import TestClient

    from raydr.serve.colocated import colocated_searcher
    from raydr.serve.config import AppArgs
    from raydr.serve.http import build_http

    args = AppArgs(index=animals)
    client = TestClient(build_http(colocated_searcher(args), args), base_url="http://127.0.0.1")
    assert client.get("/health").status_code == 200
    assert client.get("/ready").status_code == 503
    response = client.post("/v1/search", json={"query": "x"})
    check_error(response, 503, "not_ready")
    assert response.headers["Retry-After"]


def test_openapi_describes_every_route_with_examples(client):
    document = client.get("/openapi.json").json()
    routes = {"/v1/search", "/v1/embeddings", "/v1/models", "/v1/rerank", "/v2/rerank", "/rerank", "/health", "/ready"}
    assert set(document["paths"]) == routes
    example = document["components"]["schemas"]["SearchRequest"]["examples"][0]
    assert client.post("/v1/search", json=example).status_code == 200
    operation_ids = [op["operationId"] for methods in document["paths"].values() for op in methods.values()]
    assert len(set(operation_ids)) == len(operation_ids)


def test_docs_need_nothing_from_elsewhere(client):
    page = client.get("/docs").text
    assert "/v1/search" in page
    assert "exclude_ids" in page
    assert "http://" not in page.replace("http://127.0.0.1", "")
    assert "https://" not in page
    assert "<script" not in page


def test_the_page_and_its_files_are_served(client):
    page = client.get("/")
    assert page.status_code == 200
    assert page.headers["Content-Type"].startswith("text/html")
    assert client.get("/ui/../http.py").status_code == 404
    assert client.get("/ui/%2e%2e/http.py").status_code == 404


# --- what an index asks of its encoder


def test_an_encoder_of_another_version_is_refused_and_the_index_before_stays(serve_in_process, animals, tmp_path):
    client = serve_in_process()
    ready = client.get("/ready").json()
    other = with_details(animals, tmp_path / "other", encoder_version="0" * 64, version="another")
    with pytest.raises(ApiError) as refused:
        client.portal.call(client.searcher.use, str(other))
    assert (refused.value.status, refused.value.code) == (503, "encoder_mismatch")
    after = client.get("/ready").json()
    assert after["index_version"] == ready["index_version"]
    assert "embed and index the corpus again" in after["error"]
    assert client.post("/v1/search", json={"query": "x"}).status_code == 200


def test_a_methods_refiner_searches_twice_as_the_pipeline_does(serve_in_process, animals, encoder, tmp_path, reader):
    method = {**reader.details.method.model_dump(), "import_path": "tiny_serving:WithFeedback"}
    client = serve_in_process(index=with_details(animals, tmp_path / "refined", method=method, version="refined"))
    texts = ["who hunts mice", "a large animal"]
    answer = _search(client, queries=texts, k=3)
    embeddings = encoder.encode_queries([Query("", text) for text in texts])
    first = reader.search(embeddings, 2)
    for line, rows in enumerate(first.rows):
        passages = [Passage(p["passage_id"], p["text"], p["title"]) for p in reader.passages(rows)]
        embeddings[line] = (embeddings[line] + encoder.encode_passages(passages).sum(axis=0)) / 3
    top = reader.search(embeddings, 3)
    for result, rows, scores in zip(answer["results"], top.rows, top.scores, strict=True):
        assert [hit["id"] for hit in result["hits"]] == [reader.passage_ids[int(row)] for row in rows]
        assert [hit["score"] for hit in result["hits"]] == pytest.approx(scores.tolist(), abs=1e-5)
    assert "prf" in answer["timings_ms"]
    assert answer["prf"] == {"method": "learned", "k": 2, "applied": True}
