"""Zero-shot retrieval with a pretrained encoder: no training, the baseline every method starts from.

Numbers to reproduce: all-MiniLM-L6-v2 on BEIR SciFact (test), nDCG@10 0.645, the figure published with
sentence-transformers (maximum length 256, title and text joined by a space, exact search):

    python jobs/reproduce.py jobs/configs/zero_shot.yaml data.path=DIR data.split=test out=OUT
"""

from __future__ import annotations

from raydr.encoders.text import TextEncoder
from raydr.methods.base import Method
from raydr.protocols import Encoder


class ZeroShot(Method):
    """The encoder of a checkpoint, as it is."""

    Config = TextEncoder.Config

    def build_encoder(self) -> Encoder:
        return TextEncoder(self.config)
