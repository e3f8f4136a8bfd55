"""The index: FAISS shards and a BM25 side on disk, searched in-process or by Ray actors, merged in one place."""
