"""Every shipped config for real models, as it stands, on the smallest slice of each generation that it is meant for.

Each is minutes of compiling, so they run by name:   pytest -m long tests/programs/test_plan_shipped.py
"""

import subprocess
import sys

import pytest

pytestmark = [pytest.mark.long, pytest.mark.once]

SLICES = {
    "wan22_5b:distill": ("v5e:2x2", "v5p:2x2x1", "v6e:2x2"),
    "wan22_5b:wmsd": ("v5e:2x2", "v5p:2x2x1", "v6e:2x2"),
    "ltx2:distill": ("v5e:4x4", "v5p:2x2x1", "v6e:4x4"),
    "ltx2:wmsd": ("v5e:4x4", "v5p:2x2x1", "v6e:4x4"),
    "ltx2:wmsd_grpo": ("v5e:4x4", "v5p:2x2x1", "v6e:4x4"),
}


@pytest.mark.parametrize("config, topology", [(c, t) for c, slices in SLICES.items() for t in slices])
def test_a_shipped_config_fits(config, topology):
    pytest.importorskip("libtpu", reason="libtpu is in the extra `tpu`")
    # A process each: what was compiled stays in the memory of one, gigabytes of it.
    command = [sys.executable, "-m", "world_distill", "plan", "--config", config, "--topology", topology]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(done.stdout)
    assert done.returncode == 0 and "fits" in done.stdout.splitlines()
