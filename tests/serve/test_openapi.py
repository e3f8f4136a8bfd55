"""The OpenAPI document says what the server does: both judge the same bodies alike, and every status is in it."""

import pytest
from jsonschema import Draft202012Validator
from tiny_pictures import picture, sent
from tiny_serving import check_error

FILTERS = [{"year": 2000}, {"kind": ["pet", None]}, {"year": {"gte": 1, "lt": 2.5}}, {"kind": {"not": ["pet"]}}]
WRONG_FILTERS = [{"kind": []}, {"kind": {}}, {"kind": {"near": 1}}, {"year": {"gte": [1]}}, {"kind": [["pet"]]}]
BODIES = {
    "/v1/search": [
        {},
        {"query": "x"},
        {"query": None, "queries": ["x"]},
        {"query": "x", "queries": None},
        {"query": "x", "queries": ["x"]},
        {"query": None, "queries": None},
        {"query": " \n"},
        {"queries": []},
        {"queries": ["x", "\t"]},
        {"query": "x", "k": 2.0},
        {"query": "x", "k": 2.5},
        {"query": "x", "k": 0},
        {"query": "x", "k": True},
        {"query": "x", "rerank_depth": 0},
        {"query": "x", "feedback": None, "mode": "bm25"},
        {"query": "x", "feedback": {"scores": "lexical", "depth": 2}},
        {"query": "x", "feedback": {"scores": "lexical", "depth": 1}},
        {"query": "x", "feedback": {"scores": None, "depth": 2}},
        {"query": "x", "feedback": {"order": "lexical"}, "mode": "bm25"},
        *({"query": "x", "prf": prf} for prf in (None, {"method": "none"}, {"method": "average", "k": 2.0})),
        *(
            {"query": "x", "prf": prf}
            for prf in ({"k": 0}, {"method": "mean"}, {"method": "rocchio", "k": 1.5}, "average")
        ),
        *({"query": "x", "prf": prf, "mode": "bm25"} for prf in (None, {"method": "none"})),
        *({"query": "x", "filters": filters} for filters in (*FILTERS, *WRONG_FILTERS)),
    ],
    "/v1/embeddings": [
        {"input": ""},
        {"input": []},
        {"input": ["x", ""]},
        {"input": "x", "dimensions": 0},
        {"input": "x", "dimensions": 8.0, "unheard_of": 1},
        {"input": [101.0, 102]},
        {"input": [[101, 102.0]]},
        {"input": [[101], []]},
        {"input": [101.5]},
        {"input": [True]},
        {"input": ["x", 1]},
    ],
    "/v1/rerank": [
        {"query": "", "documents": ["x"]},
        {"query": "x", "documents": []},
        {"query": "x", "documents": ["x", {"text": "x", "more": 1}]},
        {"query": "x", "documents": [{"title": "x"}]},
        {"query": "x", "documents": ["x"], "top_n": 0},
        {"query": "x", "documents": ["x"], "top_n": 1.0, "max_tokens_per_doc": 3.0},
        {"query": "x", "documents": ["x"], "max_tokens_per_doc": 0},
    ],
}


P = sent(picture("red"))
PICTURES = {
    "/v1/search": [
        *({"image": image} for image in (P, None, "", [P])),
        *({"image": P, "query": query} for query in ("x", None, " ")),
        *({"image": P, "mode": mode} for mode in ("dense", "hybrid", "bm25")),
        *({"image": P, "query": "x", "mode": mode} for mode in ("dense", "hybrid", "bm25")),
        *({"query": "x", "instruction": "y", "mode": mode} for mode in ("hybrid", "bm25")),
        {"query": "x", "instruction": "", "mode": "bm25"},
        {"query": "x", "image": None, "mode": "bm25"},
        *({"images": images} for images in ([P], [None], [P, None], [], None)),
        *({"queries": ["x", "y"], "images": images} for images in ([None, P], [None, None], None)),
        {"queries": ["x", None], "images": [None, P]},
        {"queries": ["x", None]},
        *({"queries": [None], "images": [P], "mode": mode} for mode in ("dense", "hybrid")),
        {"queries": ["x"], "images": [None], "mode": "bm25"},
        {"queries": ["x"], "images": [P], "mode": "bm25"},
        *({"image": P, **other} for other in ({"queries": ["x"]}, {"images": [P]}, {"images": None})),
        {"query": "x", "fields": ["image"]},
    ],
    "/v1/embeddings": [
        *({"input": value} for value in ({"image": P}, [{"image": P}], {"image": P, "text": "x", "more": 1})),
        *(
            {"input": value}
            for value in ({}, [{"text": ""}], {"image": None}, {"image": None, "text": "x"}, [{"image": 1}])
        ),
        {"input": ["x", {"text": "y"}]},
        *({"input": "x", "instruction": "y", "input_type": side} for side in ("query", "search_query", "document")),
        {"input": "x", "instruction": "y"},
        {"input": "x", "instruction": ""},
    ],
}


@pytest.fixture(scope="module")
def served(serve_in_process):
    client = serve_in_process(rerankers={"lexical": {"import_path": "tiny_serving:LexicalReranker"}})
    yield client
    client.__exit__()


@pytest.fixture(scope="module")
def document(served):
    return served.get("/openapi.json").json()


@pytest.mark.parametrize("path", BODIES)
def test_the_schema_takes_what_the_server_takes(served, document, path):
    check_bodies(served, document, path, BODIES[path])


@pytest.mark.parametrize("path", PICTURES)
def test_so_it_does_of_pictures(serve_in_process, pictures, document, path):
    check_bodies(serve_in_process(index=pictures), document, path, PICTURES[path])


def check_bodies(served, document, path, bodies):
    schema = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    validator = Draft202012Validator({**schema, "components": document["components"]})
    for body in bodies:
        answer = served.post(path, json=body)
        assert answer.status_code in (200, 422), (body, answer.text)
        assert validator.is_valid(body) == (answer.status_code == 200), (body, answer.text)


def test_a_model_that_is_not_there_is_in_the_document(served, document):
    bodies = {
        "/v1/search": {"query": "x", "rerank": True, "reranker": "other"},
        "/v1/embeddings": {"input": "x", "model": "other"},
        "/v1/rerank": (rerank := {"query": "x", "documents": ["x"], "model": "other"}),
        "/v2/rerank": rerank,
    }
    for path, body in bodies.items():
        check_error(served.post(path, json=body), 404, "model_not_found")
        assert "404" in document["paths"][path]["post"]["responses"], path


def test_a_wrong_method_is_named_before_a_wrong_content_type(served, document):
    for path, methods in document["paths"].items():
        if "post" not in methods:
            check_error(
                served.post(path, content=b"x", headers={"Content-Type": "text/plain"}), 405, "method_not_allowed"
            )
