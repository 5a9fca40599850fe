"""One thread a test process: several run at once, and OpenMP's threads spin when there are more of them than cores."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
