"""Trains a config's method; leaves OUT/train and what the training needed beside it.

    python jobs/train.py jobs/configs/contrastive.yaml data.path=DIR out=OUT
    ray job submit --working-dir . -- python jobs/train.py CONFIG.yaml data.path=/abs/DIR out=/abs/OUT

In a Ray job, give absolute paths: a relative one would lie in the job's own copy of the working directory.
"""

import sys

from raydr.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
