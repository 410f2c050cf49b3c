"""What holds for every test: eight virtual CPU devices, and one compilation cache for all test processes.

It runs before JAX is imported, so the environment decides; programs that a test starts inherit it.
"""

import os
import pathlib
import tempfile

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_NUM_CPU_DEVICES"] = "8"
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(
    pathlib.Path(tempfile.gettempdir()) / f"dit_jax_test_compilations_{os.getuid()}"
)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
