"""Reorders a run with a reranker; needs OUT/corpus, OUT/index and OUT/search (or rerank.run=FILE), leaves OUT/rerank.

    python jobs/rerank.py jobs/configs/first.yaml data.path=DIR data.split=test out=OUT
    ray job submit --working-dir . -- python jobs/rerank.py CONFIG.yaml data.path=/abs/DIR out=/abs/OUT

In a Ray job, give absolute paths: a relative one would lie in the job's own copy of the working directory.
"""

import sys

from raydr.cli import main

if __name__ == "__main__":
    sys.exit(main(["rerank", *sys.argv[1:]]))
