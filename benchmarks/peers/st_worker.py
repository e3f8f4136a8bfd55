"""A neighbour's encoder in an interpreter of its own, spoken to by JSON lines; started by `benchmarks/encode.py`.

    {"do": "load", "peer": "sentence-transformers", "model": DIR, "max_tokens": 256,
     "device": "cpu", "threads": 2, "options": {}}              -> {"load_s": 1.2}
    {"do": "texts", "file": "texts.json"}                       -> {"texts": 2000}
    {"do": "encode", "batch_size": 32, "out": "FILE.npy"}       -> {"s": 1.9, "rss_mib": 500.1}

Runs in any environment that has the peer; imports nothing of raydr.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any


def load(request: dict[str, Any]) -> Any:
    """A function (texts, batch_size) -> embeddings."""
    if request["peer"] == "flagembedding":
        from FlagEmbedding import FlagAutoModel

        model = FlagAutoModel.from_finetuned(request["model"], model_class="encoder-only-base", **request["options"])
        return lambda texts, size: model.encode(texts, batch_size=size)
    from sentence_transformers import SentenceTransformer

    options = dict(request["options"])
    calibration = options.pop("int8_calibrated_on", None)
    if dtype := options.pop("dtype", None):
        import torch

        options["model_kwargs"] = {"dtype": getattr(torch, dtype)}
    model = SentenceTransformer(request["model"], device=request["device"], local_files_only=True, **options)
    model.max_seq_length = request["max_tokens"]
    if calibration:
        quantize(model, json.loads(Path(calibration).read_text(encoding="utf-8")))
    return lambda texts, size: model.encode(texts, batch_size=size, show_progress_bar=False)


def quantize(model: Any, texts: list[str]) -> None:
    """Static int8, as ST's `export_static_quantized_openvino_model` makes it, calibrated on `texts`."""
    import nncf

    runner = model[0].auto_model
    names = {port.get_any_name() for port in runner.model.inputs}

    def inputs(text: str) -> dict[str, Any]:
        tokens = model.tokenizer([text], return_tensors="np", truncation=True, max_length=model.max_seq_length)
        return {name: value for name, value in tokens.items() if name in names}

    data = nncf.Dataset(texts, inputs)
    kind = nncf.ModelType.TRANSFORMER
    runner.model = nncf.quantize(runner.model, data, model_type=kind, subset_size=len(texts))
    runner.request = None
    runner.compile()


def peak_rss_mib() -> float:
    status = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) / 1024 for line in status if line.startswith("VmHWM"))


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print must not mix with the answers
    encode, texts = None, []
    for line in sys.stdin:
        request = json.loads(line)
        start = time.perf_counter()
        if request["do"] == "load":
            import torch

            torch.set_num_threads(request["threads"])
            encode = load(request)
            encode(["warm"], 1)
            answer: dict[str, Any] = {"load_s": time.perf_counter() - start}
        elif request["do"] == "texts":
            texts = json.loads(Path(request["file"]).read_text(encoding="utf-8"))
            answer = {"texts": len(texts)}
        else:
            embeddings = encode(texts, request["batch_size"])
            answer = {"s": time.perf_counter() - start, "rss_mib": peak_rss_mib()}
            if request.get("out"):
                import numpy as np

                np.save(request["out"], np.asarray(embeddings, dtype=np.float32))
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
