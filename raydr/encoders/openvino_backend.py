"""The network in OpenVINO: the fastest way through a transformer on an x86 CPU.

Notable: the very same PyTorch module is converted once, with dynamic shapes, and kept in a cache keyed by weights and
settings (`RAYDR_CACHE`, by default `~/.cache/raydr`); later starts need neither torch nor the conversion. OpenVINO
decides how many batches run side by side on the given threads (its throughput mode). There is one network, always
given an attention mask: a second, unmasked one was 2 to 3 % faster at twice the memory.

    OpenVinoBackend(cached_model(key, load), precision="bfloat16", num_threads=2).forward(input_ids, None)
"""

from __future__ import annotations

import hashlib
import queue
import shutil
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import openvino as ov
from jaxtyping import Float32, Int64

from raydr.encoders.cache import cache_folder
from raydr.encoders.precision import Precision
from raydr.models.dual_encoder import DualEncoder

_HINTS = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}


def cached_model(key: str, load: Callable[[], DualEncoder]) -> Path:
    """The converted model for `key` (what decides the network); converts `load()` when it is not in the cache."""
    name = hashlib.sha256(f"{key} openvino={ov.__version__}".encode()).hexdigest()[:32]
    folder = cache_folder() / "openvino" / name
    if not (folder / "model.xml").is_file():
        folder.parent.mkdir(parents=True, exist_ok=True)
        # Written aside and renamed, so that several processes may convert at once and none reads half a model.
        scratch = Path(tempfile.mkdtemp(prefix=f".{name}.", dir=folder.parent))
        try:
            ov.save_model(convert(load()), scratch / "model.xml", compress_to_fp16=False)
            if not folder.exists():
                scratch.rename(folder)
        except OSError:
            if not (folder / "model.xml").is_file():  # another process was not first: a real failure
                raise
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return folder / "model.xml"


def convert(network: DualEncoder) -> ov.Model:
    """An OpenVINO model with inputs `input_ids` and `attention_mask`, both of dynamic shape (text, token)."""
    import torch

    example = torch.ones((2, 7), dtype=torch.int64)
    shape = ov.PartialShape([-1, -1])
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracer warnings about shape checks, which the tests of equality answer
        return ov.convert_model(
            network,
            example_input={"input_ids": example, "attention_mask": example},
            input=[("input_ids", shape, ov.Type.i64), ("attention_mask", shape, ov.Type.i64)],
        )


class OpenVinoBackend:
    """Runs up to `num_streams` batches at once, each on an inference request of its own."""

    def __init__(self, model: Path, *, precision: Precision, num_threads: int) -> None:
        settings = {
            "PERFORMANCE_HINT": "THROUGHPUT",
            "INFERENCE_PRECISION_HINT": _HINTS[precision],
            "INFERENCE_NUM_THREADS": num_threads,
        }
        self._compiled = ov.Core().compile_model(model, "CPU", settings)
        self.num_streams: int = self._compiled.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS")
        self._requests: queue.SimpleQueue[ov.InferRequest] = queue.SimpleQueue()
        for _ in range(self.num_streams):
            self._requests.put(self._compiled.create_infer_request())
        # OpenVINO's Python binding fills its tables on first use and deadlocks (its lock against the interpreter's)
        # when two threads come first together; so the first batch runs here, before there is a second thread.
        self.forward(np.ones((1, 1), dtype=np.int64), None)

    def forward(
        self, input_ids: Int64[np.ndarray, "text token"], attention_mask: Int64[np.ndarray, "text token"] | None
    ) -> Float32[np.ndarray, "text dim"]:
        mask = np.ones_like(input_ids) if attention_mask is None else attention_mask
        request = self._requests.get()
        try:
            return request.infer([input_ids, mask], share_inputs=True)[0]
        finally:
            self._requests.put(request)

    def free_memory(self) -> None:
        self._compiled.release_memory()
