"""Pictures in searches and embeddings: what is found is the encoder's, what is sent is checked, what is not asked for
stays where it is.
"""

import asyncio
import base64
import struct
import time
import zlib
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
from tiny_pictures import (
    PASSAGES,
    PREPARED,
    ColourEncoder,
    ColourReranker,
    WordReranker,
    build_pictures,
    embedding,
    picture,
    sent,
    stored,
)
from tiny_serving import check_error

from raydr.artifacts import open_artifact
from raydr.config import Component
from raydr.index.reader import IndexReader
from raydr.serve.config import Limits
from raydr.serve.encoder import Encoder
from raydr.serve.pictures import media_type
from raydr.serve.shard import read_index_info
from raydr.types import Passage, Query
from tests.encoders.test_multimodal import checkpoint

RERANKERS = {
    name: Component(import_path=f"tiny_pictures:{kind}Reranker")
    for name, kind in {"colour": "Colour", "word": "Word"}.items()
}
RED, GREEN = sent(picture("red")), sent(picture("green"))


@pytest.fixture(scope="module")
def gallery(serve_in_process, pictures):
    client = serve_in_process(index=pictures, rerankers=RERANKERS)
    yield client
    client.__exit__()


def search(client, **body):
    response = client.post("/v1/search", json=body)
    assert response.status_code == 200, response.text
    return response.json()


def ids(answer) -> list[str]:
    return [hit["id"] for hit in answer["hits"]]


def prepared(image: str) -> bytes:
    return stored(base64.b64decode(image))


# --- what is found


@pytest.mark.parametrize(
    ("body", "query"),
    [
        ({"image": RED}, ("", RED, "")),
        ({"image": f"data:image/png;base64,{RED}"}, ("", RED, "")),
        ({"query": "the same in blue", "image": RED}, ("the same in blue", RED, "")),
        ({"query": "something red", "instruction": "Find a picture."}, ("something red", None, "Find a picture.")),
        ({"image": GREEN, "instruction": "Find words."}, ("", GREEN, "Find words.")),
    ],
    ids=["picture", "data URL", "picture and words", "instruction", "picture and instruction"],
)
def test_the_hits_are_those_of_the_query_as_the_encoder_embeds_it(gallery, pictures, body, query):
    reader = IndexReader.open(pictures)
    text, image, instruction = query
    vector = embedding(text, None if image is None else prepared(image), instruction)
    top = reader.search(vector[None], 6)
    answer = search(gallery, k=6, **body)
    assert ids(answer) == reader.passage_ids.take(top.rows[0]).tolist()
    assert [hit["score"] for hit in answer["hits"]] == pytest.approx(top.scores[0].tolist(), abs=1e-5)
    assert answer.get("query") == (text or None)
    assert ("picture" in answer["timings_ms"]) is (image is not None)


def test_pictures_are_found_by_words_and_words_by_pictures(gallery):
    assert set(ids(search(gallery, query="red", k=2))) == {"red", "rose"}
    assert set(ids(search(gallery, image=RED, k=2))) == {"red", "rose"}


def test_many_queries_are_of_any_kind_and_keep_their_order(gallery):
    body = {"queries": ["the blue sea", None, "yellow"], "images": [None, GREEN, RED], "k": 6}
    answer = search(gallery, **body)
    assert [result.get("query") for result in answer["results"]] == ["the blue sea", None, "yellow"]
    alone = [{"query": "the blue sea"}, {"image": GREEN}, {"query": "yellow", "image": RED}]
    for result, one in zip(answer["results"], alone, strict=True):
        assert result["hits"] == search(gallery, k=6, **one)["hits"]
    (first, second) = search(gallery, images=[GREEN, RED], k=1)["results"]
    assert (first["hits"][0]["id"], second["hits"][0]["id"]) == ("green", "red")
    assert "query" not in first


def test_words_and_pictures_are_fused_with_words(gallery):
    answer = search(gallery, query="noon", image=RED, mode="hybrid", k=6)
    assert set(ids(answer)[:3]) >= {"sky", "red"}
    assert "bm25" in answer["timings_ms"]


def test_a_multimodal_language_model_serves_what_it_embeds(serve_in_process, tmp_path):
    model = checkpoint("llava", tmp_path / "llava")
    args = {"model": str(model), "image_size": 32, "precision": "float32", "device": "cpu"}
    method = Component(import_path="raydr.methods.mm_embed:MMEmbed", args=args)
    client = serve_in_process(index=build_pictures(tmp_path / "run", method))
    reader, encoder = IndexReader.open(tmp_path / "run/index"), method.build().encoder()
    query = Query("", "the same in blue", prepared(RED), "Find a picture.")
    top = reader.search(encoder.encode_queries([query]), 6)
    answer = search(client, image=RED, query=query.text, instruction=query.instruction, k=6)
    assert ids(answer) == reader.passage_ids.take(top.rows[0]).tolist()
    assert [hit["score"] for hit in answer["hits"]] == pytest.approx(top.scores[0].tolist(), abs=1e-5)
    embedded = client.post(
        "/v1/embeddings", json={"input": [{"image": RED}, {"image": GREEN, "text": "x"}, "x"]}
    ).json()
    passages = [Passage("", "", "", prepared(RED)), Passage("", "x", "", prepared(GREEN)), Passage("", "x")]
    found = [item["embedding"] for item in embedded["data"]]
    np.testing.assert_allclose(found, encoder.encode_passages(passages), atol=1e-5)
    card = client.get("/v1/models").json()["data"][0]
    assert (card["id"], card["reads_instructions"]) == ("llava", True)


# --- what a hit carries


def test_a_hit_carries_its_picture_where_it_is_asked_for_and_its_bytes_never_elsewhere(gallery):
    answer = search(gallery, query="red", k=6, fields=["image", "metadata"])
    shown = {hit["id"]: hit.get("image") for hit in answer["hits"]}
    for id_, _, _, colour in PASSAGES:
        url = None if colour is None else f"data:image/png;base64,{sent(stored(picture(colour)))}"
        assert shown[id_] == url
    assert all(set(hit["metadata"]) == {"kind"} for hit in answer["hits"])
    assert all("image" not in hit for hit in search(gallery, query="red", k=6)["hits"])


def test_pictures_travel_only_for_the_hits_that_show_them(gallery, monkeypatch):
    travelled: list[list[int]] = []

    def listening(handle):
        def call(method):
            async def remote(*arguments):
                answer = await getattr(handle, method).remote(*arguments)
                records = answer if method == "passages" else answer.passages
                travelled.append([row for row, record in records.items() if record.get("image")])
                return answer

            return SimpleNamespace(remote=remote)

        return SimpleNamespace(search=call("search"), passages=call("passages"))

    monkeypatch.setattr(gallery.searcher, "_shards", [listening(handle) for handle in gallery.searcher._shards])
    search(gallery, query="red", k=6, rerank=True, reranker="word")
    assert not any(travelled)
    search(gallery, query="red", k=2, fields=["image"])
    assert sum(map(len, travelled)) == 1  # of the red one and the rose
    search(gallery, query="red", k=1, rerank=True, reranker="colour", rerank_depth=6)
    assert sum(map(len, travelled)) == 1 + 4


def test_passages_can_be_told_by_whether_they_have_a_picture(gallery):
    assert set(ids(search(gallery, query="red", filters={"image": None}))) == {"rose", "sky"}
    only = {"image": {"not": None}, "kind": "shape"}
    assert set(ids(search(gallery, query="red", filters=only))) == {"red", "green", "blue", "lemon"}
    response = gallery.post("/v1/search", json={"query": "red", "filters": {"image": "x"}})
    check_error(response, 422, "invalid_filter", "filters.image")


def test_models_say_what_is_read_and_what_is_there(gallery, client):
    card = gallery.get("/v1/models").json()["data"][0]
    assert (card["modalities"], card["reads_instructions"], card["has_images"]) == (
        ["text", "image,text", "image"],
        True,
        True,
    )
    assert card["metadata_columns"] == ["kind"]
    card = client.get("/v1/models").json()["data"][0]
    assert (card["modalities"], card["reads_instructions"], card["has_images"]) == (["text"], False, False)


def test_an_index_says_how_its_pictures_were_prepared_and_one_of_texts_says_nothing(pictures, animals):
    assert read_index_info(str(pictures)).images == PREPARED
    assert "images" not in open_artifact(animals, kind="index").manifest.details


def test_metadata_that_is_called_image_is_no_picture(animals):
    info = read_index_info(str(animals))
    info = replace(info, schema=info.schema.append(pa.field("image", pa.string())))
    assert not info.has_images
    assert info.metadata_columns == ["kind", "year", "image"]
    assert "image" in info.inline_columns


# --- rerankers


@pytest.mark.parametrize(
    "how", [{"rerank": True, "reranker": "colour"}, {"feedback": {"scores": "colour", "depth": 4}}]
)
def test_a_reranker_that_reads_pictures_is_given_them(gallery, how):
    ColourReranker.seen.clear()
    search(gallery, image=GREEN, k=6, instruction="Find it.", **how)
    ((query, passages),) = ColourReranker.seen
    assert (query.text, query.image, query.instruction) == ("", prepared(GREEN), "Find it.")
    colours = {id_: colour for id_, _, _, colour in PASSAGES}
    texts = {(title, text): id_ for id_, title, text, _ in PASSAGES}
    for passage in passages:
        colour = colours[texts[passage.title, passage.text]]
        assert passage.image == (None if colour is None else stored(picture(colour)))


def test_a_reranker_of_words_gets_words_and_refuses_a_picture_alone(gallery):
    WordReranker.seen.clear()
    search(gallery, query="a rose", image=RED, k=6, rerank=True, reranker="word")
    ((query, passages),) = WordReranker.seen
    assert (query.text, query.image) == ("a rose", None)
    assert all(passage.image is None for passage in passages)
    for how in ({"rerank": True, "reranker": "word"}, {"feedback": {"order": "word"}}):
        body = {"image": RED, "on_rerank_failure": "keep_order", **how}  # the request is wrong, not the reranker gone
        error = check_error(gallery.post("/v1/search", json=body), 422, "invalid_value", "image")
        assert "'word' reads no pictures" in error["message"]


# --- embeddings


@pytest.mark.parametrize("side", ["query", "document"])
def test_embeddings_take_pictures_in_jinas_form(gallery, side):
    inputs = [{"image": RED}, "plain text", {"text": "as an object"}, {"image": GREEN, "text": "both as one"}]
    body = {"input": inputs, "input_type": side, **({"instruction": "Find it."} if side == "query" else {})}
    answer = gallery.post("/v1/embeddings", json=body)
    assert answer.status_code == 200, answer.text
    instruction = body.get("instruction", "")
    expected = [
        embedding("", prepared(RED), instruction),
        embedding("plain text", None, instruction),
        embedding("as an object", None, instruction),
        embedding("both as one", prepared(GREEN), instruction),
    ]
    np.testing.assert_allclose([item["embedding"] for item in answer.json()["data"]], expected, atol=1e-6)
    single = gallery.post("/v1/embeddings", json={**body, "input": {"image": RED}}).json()["data"]
    np.testing.assert_allclose([item["embedding"] for item in single], expected[:1], atol=1e-6)


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        ({"input": [{}]}, "invalid_value", "input"),
        ({"input": [{"text": ""}]}, "invalid_value", "input"),
        ({"input": [{"image": 3}]}, "invalid_value", "input"),
        ({"input": ["a", {"image": "http://127.0.0.1/a.png"}]}, "invalid_image", "input.1.image"),
        ({"input": {"image": "!"}}, "invalid_image", "input.image"),
        ({"input": [[1, 2], {"text": "x"}]}, "invalid_value", "input"),
        ({"input": "x", "instruction": "y"}, "invalid_value", None),
        ({"input": [{"image": RED}] * 33}, "limit_exceeded", "input"),
    ],
)
def test_faulty_inputs_name_the_field(gallery, body, code, param):
    check_error(gallery.post("/v1/embeddings", json=body), 422, code, param)


# --- what is refused


def png_claiming(width: int, height: int) -> str:
    """A PNG of a few bytes whose header announces a picture of another size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return sent(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")
    )


TRUNCATED = sent(picture("red", (300, 300))[:-300])


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        ({"image": "https://example.com/cat.png"}, "invalid_image", "image"),
        ({"image": "file:///etc/passwd"}, "invalid_image", "image"),
        ({"image": "/etc/passwd"}, "invalid_image", "image"),
        ({"image": "data:text/html;base64,PGI+"}, "invalid_image", "image"),
        ({"image": "data:image/png," + RED}, "invalid_image", "image"),
        ({"image": RED[:-1]}, "invalid_image", "image"),
        ({"image": "é" + RED}, "invalid_image", "image"),
        ({"image": sent(b"no picture at all")}, "invalid_image", "image"),
        ({"image": sent(b"<svg xmlns='http://www.w3.org/2000/svg'/>")}, "invalid_image", "image"),
        ({"image": sent(picture("red", form="TIFF"))}, "invalid_image", "image"),
        ({"image": TRUNCATED}, "invalid_image", "image"),
        ({"image": png_claiming(60_000, 60_000)}, "invalid_image", "image"),
        ({"image": png_claiming(5001, 5000)}, "invalid_image", "image"),
        ({"image": png_claiming(1, 65_536)}, "invalid_image", "image"),
        ({"images": [RED, TRUNCATED]}, "invalid_image", "images.1"),
        ({"image": ""}, "invalid_value", "image"),
        ({"image": [RED]}, "invalid_value", "image"),
        ({"image": RED, "query": " "}, "invalid_value", "query"),
        ({"image": RED, "queries": ["x"]}, "invalid_value", None),
        ({"query": "x", "images": [RED]}, "invalid_value", None),
        ({"queries": ["x", "y"], "images": [RED]}, "invalid_value", None),
        ({"queries": ["x", None], "images": [RED, None]}, "invalid_value", None),
        ({"queries": [None]}, "invalid_value", None),
        ({"images": [None]}, "invalid_value", None),
        ({"image": RED, "mode": "bm25"}, "invalid_value", None),
        ({"image": RED, "mode": "hybrid"}, "invalid_value", None),
        ({"image": RED, "query": "x", "mode": "bm25"}, "invalid_value", None),
        ({"query": "x", "instruction": "y", "mode": "bm25"}, "invalid_value", None),
        ({"query": "x", "instruction": "y" * 8193}, "limit_exceeded", "instruction"),
        ({"image": "A" * 3_900_000}, "limit_exceeded", "image"),
        ({"images": [RED] * 33}, "limit_exceeded", "images"),
        ({"query": "x", "k": 101, "fields": ["image"]}, "limit_exceeded", "k"),
    ],
)
def test_faulty_pictures_are_refused_before_they_cost_anything(gallery, body, code, param):
    batches = len(ColourEncoder.batches)
    started = time.monotonic()
    error = check_error(gallery.post("/v1/search", json=body), 422, code, param)
    assert time.monotonic() - started < 10
    assert len(ColourEncoder.batches) == batches
    assert len(error["message"]) < 300


def test_a_picture_of_any_form_that_is_read_is_a_picture(gallery):
    for form in ("PNG", "JPEG", "WEBP", "GIF", "BMP"):
        assert ids(search(gallery, image=sent(picture("green", form=form)), k=1)) == ["green"], form


def test_an_encoder_of_words_says_so(client):
    for body, param in [
        ({"image": RED}, "image"),
        ({"query": "x", "image": RED}, "image"),
        ({"queries": ["x", "y"], "images": [None, RED]}, "images.1"),
        ({"query": "x", "instruction": "y"}, "instruction"),
    ]:
        error = check_error(client.post("/v1/search", json=body), 422, "invalid_value", param)
        assert "the encoder of this index reads" in error["message"]
    response = client.post("/v1/embeddings", json={"input": ["x", {"image": RED}]})
    check_error(response, 422, "invalid_value", "input.1.image")
    assert "image" not in search(client, query="cat", fields=["image"], k=1000)["hits"][0]


def test_the_limits_of_pictures_and_bodies_fit_each_other():
    assert Limits().largest_image_bytes == (4 << 20) * 7 // 8 * 3 // 4
    assert Limits(body_bytes=16 << 20, image_bytes=10 << 20).largest_image_bytes == 10 << 20
    with pytest.raises(ValueError, match="does not fit body_bytes"):
        Limits(image_bytes=4 << 20)


def test_what_a_file_is_is_told_by_its_first_bytes():
    for form in ("PNG", "JPEG", "WEBP", "GIF"):
        assert media_type(picture("red", form=form)) == f"image/{form.lower()}"
    assert media_type(b"<svg onload=alert(1)>") == "application/octet-stream"


# --- the encoder's batches


def test_pictures_and_words_never_share_a_batch(pictures):
    image = picture("red")
    queries = [Query("", "a"), Query("", "", image), Query("", "b"), Query("", "c", image), Query("", "", image)]
    passages = [Passage("", "a"), Passage("", "", "", image)]

    async def scenario() -> tuple[np.ndarray, np.ndarray]:
        replica, ref = Encoder(2), read_index_info(str(pictures)).ref
        await replica.prepare(ref)
        ColourEncoder.batches.clear()
        found = await replica.encode(ref, queries, "query", request_id="1")
        return found, await replica.encode(ref, passages, "passage", request_id="2")

    asked, kept = asyncio.run(scenario())
    assert sorted(ColourEncoder.batches) == [["image"], ["image", "image"], ["image,text"], ["text"], ["text", "text"]]
    np.testing.assert_allclose(asked, [embedding(query.text, query.image) for query in queries], atol=1e-6)
    np.testing.assert_allclose(kept, [embedding(passage.text, passage.image) for passage in passages], atol=1e-6)


def test_a_picture_counts_as_many_tokens_as_the_operator_says(pictures):
    query = Query("", "", picture("red"))

    async def scenario() -> list[int]:
        replica, ref = Encoder(2), read_index_info(str(pictures)).ref
        replica.reconfigure({"batch_tokens": 1000, "image_tokens": 400})
        await replica.prepare(ref)
        ColourEncoder.batches.clear()
        ColourEncoder.gate.clear()  # the first keeps the model busy until the others wait
        works = [asyncio.create_task(replica.encode(ref, [query], "query", request_id=str(n))) for n in range(6)]
        while not ColourEncoder.batches:
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.05)
        ColourEncoder.gate.set()
        await asyncio.gather(*works)
        return [len(batch) for batch in ColourEncoder.batches]

    sizes = asyncio.run(scenario())
    assert sum(sizes) == 6
    assert max(sizes) == 2
