"""What stands in front of the routes: body size, keys, rates, hosts, headers, request ids, deadlines, overload."""

import asyncio
import json
import logging

from tiny_serving import check_error

from raydr.serve.auth import make_key
from raydr.serve.config import Limits

JSON = {"Content-Type": "application/json"}


def test_a_body_may_not_be_too_large_with_or_without_a_length(serve_in_process):
    client = serve_in_process(limits=Limits(body_bytes=2000))
    body = json.dumps({"query": "x", "exclude_ids": ["y" * 3000]}).encode()
    check_error(client.post("/v1/search", content=body, headers=JSON), 413, "body_too_large")
    chunks = (body[start : start + 100] for start in range(0, len(body), 100))  # sent chunked: no Content-Length
    check_error(client.post("/v1/search", content=chunks, headers=JSON), 413, "body_too_large")
    assert client.post("/v1/search", content=iter([b'{"query"', b': "x"}']), headers=JSON).status_code == 200


def test_keys_guard_what_searches_and_leave_probes_and_page_open(serve_in_process):
    key, entry = make_key("alice")
    client = serve_in_process(api_keys=[entry])
    guarded = [("POST", "/v1/search"), ("POST", "/v1/embeddings"), ("POST", "/v1/rerank"), ("POST", "/v2/rerank")]
    guarded += [("POST", "/rerank"), ("GET", "/v1/models")]
    for method, path in guarded:
        response = client.request(method, path, json={"query": "x"})
        check_error(response, 401, "missing_api_key")
        assert response.headers["WWW-Authenticate"] == "Bearer"
        check_error(client.request(method, path, headers={"Authorization": "Bearer no"}), 401, "invalid_api_key")
    for path in ("/health", "/ready", "/openapi.json", "/docs", "/"):
        assert client.get(path).status_code == 200, path
    headers = {"Authorization": f"Bearer {key}"}
    assert client.post("/v1/search", json={"query": "x"}, headers=headers).status_code == 200


def test_a_key_beyond_its_rate_is_told_when_to_come_back(serve_in_process):
    key, entry = make_key("alice")
    client = serve_in_process(api_keys=[entry.model_copy(update={"requests_per_minute": 6.0, "burst": 2})])
    headers = {"Authorization": f"Bearer {key}"}
    assert [client.get("/v1/models", headers=headers).status_code for _ in range(2)] == [200, 200]
    response = client.get("/v1/models", headers=headers)
    assert check_error(response, 429, "rate_limit_exceeded")["type"] == "rate_limit_error"
    assert 1 <= int(response.headers["Retry-After"]) <= 11


def test_without_keys_only_this_machines_names_are_answered(serve_in_process):
    """A page that rebinds its own name to 127.0.0.1 sends that name as Host."""
    client = serve_in_process(allowed_hosts=["search.example"])
    body = {"query": "x"}
    for host in ("evil.example", "localhost.evil.example", "127.0.0.1.evil.example:8000", ""):
        check_error(client.post("/v1/search", json=body, headers={"Host": host}), 421, "host_not_allowed", "Host")
    for host in ("localhost", "LOCALHOST:8000", "127.0.0.1:1", "[::1]:8000", "[::1]", "search.example"):
        assert client.post("/v1/search", json=body, headers={"Host": host}).status_code == 200, host
    assert client.get("/health", headers={"Host": "10.0.0.7:8000"}).status_code == 200  # a kubelet's probe
    key, entry = make_key("alice")
    keyed = serve_in_process(api_keys=[entry])
    headers = {"Host": "any.example", "Authorization": f"Bearer {key}"}
    assert keyed.post("/v1/search", json=body, headers=headers).status_code == 200


def test_other_origins_are_not_let_in(client):
    preflight = client.options("/v1/search", headers={"Origin": "http://evil", "Access-Control-Request-Method": "POST"})
    assert preflight.status_code == 405
    response = client.post("/v1/search", json={"query": "x"}, headers={"Origin": "http://evil"})
    assert not [name for name in response.headers if name.lower().startswith("access-control")]


def test_every_answer_has_the_security_headers(client):
    for response in (client.get("/"), client.get("/nowhere"), client.post("/v1/search", json={"query": "x"})):
        assert response.headers["X-Content-Type-Options"] == "nosniff"
        assert "default-src 'none'" in response.headers["Content-Security-Policy"]
        assert "unsafe" not in response.headers["Content-Security-Policy"]
        assert response.headers["X-Frame-Options"] == "DENY"


def test_a_request_id_is_followed_and_a_bad_one_refused(client, caplog):
    with caplog.at_level(logging.INFO, logger="ray.serve"):
        answer = client.post("/v1/search", json={"query": "x"}, headers={"X-Request-ID": "trace-1.a_B"}).json()
    assert answer["request_id"] == "trace-1.a_B"
    events = {record.event: record for record in caplog.records if hasattr(record, "event")}
    assert events["encode_batch"].request_ids == ["trace-1.a_B"]
    assert events["http_request"].http_request_id == "trace-1.a_B"
    for bad in ("a b", "x" * 129, "é".encode(), "a;b"):
        check_error(client.get("/v1/models", headers={"X-Request-ID": bad}), 400, "invalid_request_id", "X-Request-ID")


def test_an_answer_that_takes_too_long_is_a_504(serve_in_process, monkeypatch):
    client = serve_in_process(limits=Limits(request_timeout_s=0.2))
    cancelled = []

    async def never(*args, **kwargs):
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.append(True)
            raise

    monkeypatch.setattr(client.searcher, "search", never)
    check_error(client.post("/v1/search", json={"query": "x"}), 504, "timeout")
    assert cancelled == [True]


def test_a_bug_is_a_500_without_details(client, monkeypatch, caplog):
    async def broken(*args, **kwargs):
        raise RuntimeError("a secret path /etc/raydr")

    monkeypatch.setattr(client.searcher, "search", broken)
    response = client.post("/v1/search", json={"query": "x"}, headers={"X-Request-ID": "r-42"})
    error = check_error(response, 500, "internal_error")
    assert "secret" not in response.text
    assert "r-42" in error["message"]
    assert "a secret path" in caplog.text  # the log has it


def test_more_requests_than_the_limit_are_turned_away_at_once(serve_in_process):
    import httpx

    client = serve_in_process(limits=Limits(concurrent_requests=2))

    async def burst():
        transport = httpx.ASGITransport(client.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as many:
            return await asyncio.gather(*(many.post("/v1/search", json={"query": f"q {n}"}) for n in range(12)))

    answers = client.portal.call(burst)
    statuses = [answer.status_code for answer in answers]
    assert set(statuses) == {200, 429}
    refused = next(answer for answer in answers if answer.status_code == 429)
    assert check_error(refused, 429, "overloaded")
    assert refused.headers["Retry-After"]
    assert client.post("/v1/search", json={"query": "x"}).status_code == 200  # nothing stays counted


def test_a_server_says_and_logs_no_key(serve_in_process, caplog):
    key, entry = make_key("alice")
    other, _ = make_key("mallory")
    client = serve_in_process(api_keys=[entry.model_copy(update={"requests_per_minute": 1.0, "burst": 2})])
    caplog.set_level(logging.DEBUG)
    answers = [
        client.get("/v1/models", headers={"Authorization": f"Bearer {sent}"})
        for sent in (key, other, key + "x", key, key)
    ]
    answers += [client.post("/v1/search", json={"query": "x"}, headers={"Authorization": f"Basic {key}"})]
    answers += [client.get(path) for path in ("/ready", "/openapi.json", "/docs", "/")]
    assert {answer.status_code for answer in answers} >= {200, 401, 429}
    for secret in (key, other, entry.sha256):
        assert all(secret not in answer.text + json.dumps(dict(answer.headers)) for answer in answers)
        assert all(secret not in json.dumps(vars(record), default=str) for record in caplog.records)
