"""How much tests with a choice try: little by default, more when asked through two environment variables."""

import os

FUZZ = int(os.environ.get("WORLD_DISTILL_FUZZ", "1"))  # factor on the number of random inputs
KILLS = int(os.environ.get("WORLD_DISTILL_KILLS", "6"))  # how often a job is killed
