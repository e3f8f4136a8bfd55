"""raydr: dense retrieval, end to end, on a Ray cluster, with the same code on a laptop.

Importing the package costs nothing: Ray, torch, FAISS, DeepSpeed and vLLM are imported by the functions that need
them. Start at `raydr.pipeline` to see the whole system in plain Python, or run `raydr --help`.
"""

from raydr.version import __version__

__all__ = ["__version__"]
