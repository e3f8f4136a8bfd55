"""Keys that see a part of the index, or may ask for some routes only; and keys that take the place of others.

Notable: what a key must not see is compared with what the same requests find without keys, by every way that leads to a
passage: all modes, filters, id lists, reranking, relevance feedback of both kinds, and what rerankers are shown.
"""

import asyncio

import pytest
from tiny_serving import ANIMALS, check_error, with_details

from raydr.artifacts import open_artifact
from raydr.config import Component
from raydr.errors import ConfigError
from raydr.serve.app import Ingress, build_app
from raydr.serve.auth import Gate, make_key
from raydr.serve.config import AppArgs
from raydr.serve.errors import ApiError

KEYS = {name: make_key(name) for name in ("pets", "farm", "nobody", "all", "search")}
ENTRIES = {
    "pets": {"filters": {"kind": "pet"}},
    "farm": {"filters": {"kind": ["farm"], "year": {"gte": 1990}}},
    "nobody": {"filters": {"kind": "none of these"}},
    "all": {},
    "search": {"routes": ["search", "models"]},
}
IDS = {"pets": {"cat", "dog"}, "farm": {"cow", "bee"}, "nobody": set(), "all": set(ANIMALS)}
SHOWN: list[str] = []


class SpyReranker:
    """Reverses the list, and remembers what it was shown."""

    def rerank(self, query, hits, passages):
        SHOWN.extend(passages[hit.passage_id].text for hit in hits)
        return [hit._replace(score=float(n)) for n, hit in enumerate(reversed(hits))][::-1]


def _entries():
    return [KEYS[name][1].model_copy(update=extra) for name, extra in ENTRIES.items()]


def _header(name):
    return {"Authorization": f"Bearer {KEYS[name][0]}"}


@pytest.fixture(scope="module")
def shared(serve_in_process, animals, tmp_path_factory):
    method = open_artifact(animals).manifest.details["method"] | {"import_path": "tiny_serving:WithFeedback"}
    refined = with_details(animals, tmp_path_factory.mktemp("shared") / "refined", method=method, version="refined")
    spy = Component(import_path="tests.serve.test_tenants:SpyReranker")
    return serve_in_process(index=refined, api_keys=_entries(), rerankers={"spy": spy})


WAYS = [
    {},
    {"filters": {"kind": ["pet", "farm", "wild"]}},
    {"filters": {"kind": {"not": "no such kind"}}},
    {"filters": {"year": {"gte": 0}}},
    {"allow_ids": list(ANIMALS)},
    {"allow_ids": ["owl", "whale"]},
    {"exclude_ids": ["cat", "cow"]},
    {"rerank": True, "rerank_depth": 6},
    {"prf": {"method": "average", "k": 3}},
    {"feedback": {"scores": "spy", "depth": 6}},
    {"feedback": {"order": "spy", "depth": 6}, "rerank": True},
    {"fields": []},
    {"queries": ["who hunts mice", "sea"] * 6, "query": None},
]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: "+".join(way) or "plain")
@pytest.mark.parametrize("mode", ["dense", "bm25", "hybrid"])
def test_a_key_finds_its_own_passages_only(shared, mode, way):
    if mode == "bm25" and {"feedback", "prf"} & set(way):
        pytest.skip("bm25 has no embedding to move")
    for name, own in IDS.items():
        SHOWN.clear()
        body = {"query": "the largest animal that hunts mice and gives milk or honey", "k": 6, "mode": mode, **way}
        response = shared.post("/v1/search", json=body, headers=_header(name))
        assert response.status_code == 200, response.text
        lists = [result["hits"] for result in response.json().get("results", [response.json()])]
        found = {hit["id"] for hits in lists for hit in hits} if "queries" in way else {h["id"] for h in lists[0]}
        possible = own & set(way.get("allow_ids", ANIMALS)) - set(way.get("exclude_ids", ()))
        assert found <= possible
        if mode == "dense":
            assert found == possible  # nothing of its own is kept from it
        assert set(SHOWN) <= {ANIMALS[id_][1] for id_ in own}
        if "rerank" in way and possible:
            assert SHOWN


def test_scores_say_nothing_of_what_a_key_does_not_see(shared):
    """Feedback by embedding: the passages of others do not move a query either."""
    body = {"query": "who hunts mice", "k": 6, "fields": []}
    own = shared.post("/v1/search", json=body, headers=_header("pets")).json()["hits"]
    asked = {**body, "filters": {"kind": "pet"}}
    assert own == shared.post("/v1/search", json=asked, headers=_header("all")).json()["hits"]


def test_a_key_does_not_learn_how_much_others_have(shared):
    (card, _) = shared.get("/v1/models", headers=_header("pets")).json()["data"]
    assert not {"num_passages", "num_shards"} & set(card)
    (card, _) = shared.get("/v1/models", headers=_header("all")).json()["data"]
    assert card["num_passages"] == 6


def test_a_key_is_for_its_routes(shared):
    assert shared.post("/v1/search", json={"query": "x"}, headers=_header("search")).status_code == 200
    assert shared.get("/v1/models", headers=_header("search")).status_code == 200
    refused = {"/v1/embeddings": {"input": "x"}, "/rerank": {"query": "q", "texts": ["a"]}}
    refused |= {path: {"query": "q", "documents": ["a"]} for path in ("/v1/rerank", "/v2/rerank")}
    for path, body in refused.items():
        error = check_error(shared.post(path, json=body, headers=_header("search")), 403, "route_not_allowed")
        assert error["type"] == "permission_error"
        assert shared.post(path, json=body, headers=_header("all")).status_code == 200


def test_filters_that_the_index_does_not_have_keep_everybody_out(serve_in_process, animals):
    key, entry = make_key("lost")
    lost = entry.model_copy(update={"filters": {"tenant": "acme"}})
    client = serve_in_process(api_keys=[lost])
    response = client.post("/v1/search", json={"query": "x"}, headers={"Authorization": f"Bearer {key}"})
    check_error(response, 503, "key_mismatch")
    assert "tenant" not in response.text
    with pytest.raises(ConfigError, match=r"api_keys, lost: filters.tenant: no such column"):
        build_app(AppArgs(index=animals, api_keys=[lost]))


@pytest.mark.parametrize("prefix", ["", "/api", "/a/b"])
def test_keys_hold_under_a_route_prefix_and_for_whatever_is_not_there(shared, prefix):
    """Serve leaves `route_prefix` in the path and names it in `root_path`."""
    from starlette.testclient import TestClient

    inside = TestClient(shared.app, base_url="http://127.0.0.1", root_path=prefix)
    for path in ("/v1/search", "/v1/search/", "/rerank", "/v1", "/metrics", "//v1/search", "/ui", "/health/x"):
        check_error(inside.post(f"{prefix}{path}", json={"query": "x"}), 401, "missing_api_key")
    assert inside.get(f"{prefix}/v1/models", headers=_header("all")).status_code == 200
    for path in ("/health", "/ready", "/openapi.json", "/docs", "/"):
        assert inside.get(f"{prefix}{path}").status_code == 200, path
    body = {"query": "animal", "k": 6, "fields": []}
    hits = inside.post(f"{prefix}/v1/search", json=body, headers=_header("farm")).json()["hits"]
    assert {hit["id"] for hit in hits} == IDS["farm"]
    check_error(inside.post(f"{prefix}/v2/rerank", json={}, headers=_header("search")), 403, "route_not_allowed")


# --- keys that change


def test_two_keys_of_one_caller_share_its_rate():
    (old, entry), (new, other) = make_key("alice"), make_key("alice")
    hashes = [entry.sha256, other.sha256]
    gate = Gate([entry.model_copy(update={"sha256": hashes, "requests_per_minute": 1.0, "burst": 3})], lambda: 0.0)
    assert [gate.admit(f"Bearer {key}").name for key in (old, new, old)] == ["alice"] * 3
    with pytest.raises(ApiError, match="more requests than alice may send"):
        gate.admit(f"Bearer {new}")


def test_keys_that_are_taken_back_are_refused_and_those_that_stay_keep_their_rate():
    (key, alice), (other_key, bob) = make_key("alice"), make_key("bob")
    slow = alice.model_copy(update={"requests_per_minute": 1.0, "burst": 2})
    gate = Gate([slow, bob], lambda: 0.0)
    gate.admit(f"Bearer {key}")
    gate.use([slow])
    with pytest.raises(ApiError, match="not known here"):
        gate.admit(f"Bearer {other_key}")
    gate.admit(f"Bearer {key}")
    with pytest.raises(ApiError, match="more requests"):
        gate.admit(f"Bearer {key}")
    gate.use([slow.model_copy(update={"burst": 5})])
    gate.admit(f"Bearer {key}")


def test_the_key_file_is_read_again_when_the_user_config_says_so(animals, tmp_path, monkeypatch):
    (old, first), (new, second) = make_key("alice"), make_key("alice")
    file = tmp_path / "keys.yaml"
    monkeypatch.setenv("RAYDR_TEST_KEYS", str(file))
    args = AppArgs(index=animals, colocate=True, api_keys_env="RAYDR_TEST_KEYS")
    ingress = Ingress.__mro__[1](args, [first], None, [], None, {})  # the class that Serve wraps

    def is_known(key):
        try:
            return ingress._gate.admit(f"Bearer {key}").name == "alice"
        except ApiError:
            return False

    async def change_keys():
        await ingress.reconfigure({"index": str(animals)})
        assert is_known(old)  # as they were when the application was built: there is no file yet
        file.write_text(f"api_keys: [{{name: alice, sha256: [{first.sha256}, {second.sha256}]}}]")
        await ingress.reconfigure({"index": str(animals), "keys_as_of": 1})
        assert is_known(old) and is_known(new)
        file.write_text(f"api_keys: [{{name: alice, sha256: {second.sha256}}}]")
        await ingress.reconfigure({"index": str(animals), "keys_as_of": 1})
        assert is_known(old)  # the same order is no new one
        await ingress.reconfigure({"index": str(animals), "keys_as_of": "2026-11-27"})
        assert is_known(new) and not is_known(old)
        file.write_text("api_keys: []")
        await ingress.reconfigure({"index": str(animals), "keys_as_of": 3})
        assert is_known(new) and not is_known(old) and not is_known("")  # in the log; never open by mistake

    asyncio.run(change_keys())
    late = Ingress.__mro__[1](args, [first], None, [], None, {})
    with pytest.raises(ConfigError, match="api_keys"):  # a replica that starts with them would let in who it must not
        asyncio.run(late.reconfigure({"index": str(animals), "keys_as_of": 3}))
