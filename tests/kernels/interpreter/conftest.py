"""These tests need a process that decorated the kernels under TRITON_INTERPRET=1: `test_interpreter.py` starts it."""

import os

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["test_*.py"]
