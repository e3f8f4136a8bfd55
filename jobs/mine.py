"""Finds negatives for training queries in an index; needs OUT/corpus and OUT/index, leaves OUT/examples.

    python jobs/mine.py jobs/configs/zero_shot.yaml data.path=DIR out=OUT mine.split=train
    ray job submit --working-dir . -- python jobs/mine.py CONFIG.yaml data.path=/abs/DIR out=/abs/OUT

In a Ray job, give absolute paths: a relative one would lie in the job's own copy of the working directory.
"""

import sys

from raydr.cli import main

if __name__ == "__main__":
    sys.exit(main(["mine", *sys.argv[1:]]))
