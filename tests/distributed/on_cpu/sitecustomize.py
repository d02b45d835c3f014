"""On the path of processes that a real launcher starts: they take the CPU for what a GPU would be."""

import os

if "LOCAL_RANK" in os.environ:
    from tests.distributed import cpu_sharding

    cpu_sharding.install()
