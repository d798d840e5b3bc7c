"""Tests run in a process per core (pytest-xdist), and then one thread of torch's is enough for each."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:  # before torch is imported, and for the processes that tests start
    os.environ.setdefault("OMP_NUM_THREADS", "1")
