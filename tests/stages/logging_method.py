"""A method whose encoder writes down what it encodes; copied to where the processes under test can import it."""

from __future__ import annotations

import os
import time
from pathlib import Path

from raydr.encoders.text import TextEncoder
from raydr.methods.base import Method


class LoggingEncoder(TextEncoder):
    """Appends the ids of every call to the file named in `ENCODE_LOG`, after sleeping `ENCODE_SLEEP_S`."""

    def encode_passages(self, passages):
        embeddings = super().encode_passages(passages)
        time.sleep(float(os.environ.get("ENCODE_SLEEP_S", "0")))
        with Path(os.environ["ENCODE_LOG"]).open("a", encoding="utf-8") as log:
            log.write(" ".join(passage.passage_id for passage in passages) + "\n")
        return embeddings


class LoggingMethod(Method):
    Config = TextEncoder.Config

    def build_encoder(self):
        return LoggingEncoder(self.config)
