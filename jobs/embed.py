"""Embeds a corpus; leaves OUT/corpus and OUT/embed.

    python jobs/embed.py jobs/configs/zero_shot.yaml data.path=DIR data.split=test out=OUT
    ray job submit --working-dir . -- python jobs/embed.py CONFIG.yaml data.path=/abs/DIR out=/abs/OUT

In a Ray job, give absolute paths: a relative one would lie in the job's own copy of the working directory.
"""

import sys

from raydr.cli import main

if __name__ == "__main__":
    sys.exit(main(["embed", *sys.argv[1:]]))
