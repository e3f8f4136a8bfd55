"""Names of files that come from a manifest, a bucket or a checkpoint: none leads out of the folder it belongs to."""

import json

import pytest

from raydr.artifacts import MANIFEST, bring, open_artifact, write_artifact
from raydr.config import Component
from raydr.encoders.checkpoint import open_checkpoint
from raydr.encoders.factory import EncoderFactory
from raydr.errors import ArtifactError, ConfigError
from raydr.index.build import build_index
from raydr.index.config import IndexConfig
from raydr.index.reader import IndexReader
from raydr.storage import bucket_of, place
from tests.corpora import embedded_corpus, integers

NAMES = ["../victim", "/etc/passwd", "a/../../victim", "./a", "a//b", "", "..", "a\0b", "x" * 300, "sub/../../victim"]


@pytest.mark.parametrize("name", NAMES)
def test_a_manifest_names_files_in_its_folder(tmp_path, name):
    with write_artifact(tmp_path / "a", kind="things", config={}) as writer:
        (writer.path / "one").write_bytes(b"1")
    file = tmp_path / "a" / MANIFEST
    manifest = json.loads(file.read_text())
    manifest["files"] = {name: manifest["files"]["one"]}
    file.write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match=r"manifest\.json: not a raydr manifest"):
        open_artifact(tmp_path / "a")


def test_a_manifest_in_a_bucket_removes_nothing_outside_its_folder(url, tmp_path, monkeypatch):
    """A file of an older state is removed when a newer manifest comes: only where the manifest may name files."""
    with write_artifact(url, kind="things", config={}) as writer:
        (writer.path / "one").write_bytes(b"1")
    victim = place(url).parent / "victim"
    victim.write_text("somebody else's")
    bucket = bucket_of(place(url))
    manifest = json.loads(bucket.read(MANIFEST))
    manifest["files"]["../victim"] = {"bytes": 1, "sha256": "0" * 64}
    bucket.write(MANIFEST, json.dumps(manifest).encode())
    with pytest.raises(ArtifactError, match="not a raydr manifest"):
        open_artifact(url)
    assert victim.read_text() == "somebody else's"


def test_a_bucket_whose_files_have_names_that_lead_out_is_refused(url, tmp_path):
    """A model's folder has no manifest: its files are those that the bucket lists, under any name."""
    import boto3

    key = f"{url.partition('://')[2].partition('/')[2]}/model"
    for name in ("config.json", "sub/../../../../escaped"):
        boto3.client("s3").put_object(Bucket="raydr-tests", Key=f"{key}/{name}", Body=b"{}")
    with pytest.raises(ArtifactError, match="leads out of this folder"):
        bring(f"{url}/model")
    assert not list(tmp_path.rglob("escaped"))


@pytest.mark.parametrize(
    ("where", "value"),
    [("bm25", "../../other"), ("shards.0.name", "../corpus"), ("shards.0.deleted", "/etc/passwd")],
)
def test_an_indexs_details_stay_in_its_folder(tmp_path, where, value):
    corpus, embeddings = embedded_corpus(tmp_path, {"a": "alpha", "b": "beta"}, integers(2, 4))
    build_index(corpus, embeddings, IndexConfig(), tmp_path / "index", use_ray=False)
    manifest = json.loads((tmp_path / "index" / MANIFEST).read_text())
    at = manifest["details"]
    *path, last = where.split(".")
    for part in path:
        at = at[int(part) if part.isdigit() else part]
    at[last], manifest["checksum"] = value, ""
    (tmp_path / "index" / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match="leaves the artifact's folder"):
        IndexReader.open(tmp_path / "index")


def test_an_index_cannot_have_a_program_run(tmp_path):
    """Its manifest names the method that made its embeddings by import path; no more than a method is built."""
    made = tmp_path / "made"
    for path, args in {
        "subprocess:Popen": {"args": ["touch", str(made)]},
        "os:system": {"command": f"touch {made}"},
        "pathlib:Path.touch": {"self": str(made)},
    }.items():
        with pytest.raises(ConfigError):
            EncoderFactory(Component(import_path=path, args=args))()
    assert not made.exists()


@pytest.mark.parametrize("path", ["../elsewhere", "/etc", "1_Pooling/../../elsewhere"])
def test_a_checkpoints_modules_are_in_its_folder(tmp_path, path):
    modules = [{"type": "sentence_transformers.models.Transformer", "path": path}]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(ConfigError, match=r"do not hold what a checkpoint's do.*leaves"):
        open_checkpoint(str(tmp_path))


def test_a_request_names_no_path(tmp_path):
    """What requests may say is in the schema, and none of it is a path; the page's files are those of one folder."""
    from starlette.testclient import TestClient

    from raydr.serve.colocated import colocated_searcher
    from raydr.serve.config import AppArgs
    from raydr.serve.http import UI, build_http

    args = AppArgs(index=tmp_path)
    client = TestClient(build_http(colocated_searcher(args), args), base_url="http://127.0.0.1")
    file = UI / "app.js"
    assert client.get(f"/ui/{file.name}").content == file.read_bytes()
    ways = [
        "..",
        "%2e%2e",
        "%252e%252e",
        "..%2f..",
        "....//..",
        "%c0%ae%c0%ae",
        "..\\..",
        "/etc",
        "//etc",
        "C:",
        "~root",
    ]
    for way in ways:
        for target in ("http.py", "../../../../../../../etc/passwd", "%00"):
            response = client.get(f"/ui/{way}/{target}")
            assert response.status_code in (404, 405), (way, target, response.text[:100])
