"""`python -m world_distill VERB`: the same as the command `world-distill VERB`."""

import sys

from world_distill.cli.command import main

if __name__ == "__main__":
    sys.exit(main())
