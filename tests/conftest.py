"""A strict environment: CPU, 8 virtual devices, rank promotion raises, warnings are errors."""

import os
import pathlib
import signal

# A shell's background job ignores Ctrl-C, and so would all programs that tests start from there.
signal.signal(signal.SIGINT, signal.default_int_handler)
ROOT = pathlib.Path(__file__).resolve().parent.parent
os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
# Also for the processes that tests start.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")

import jax
import numpy as np
import pytest
from absl import flags

jax.config.update("jax_numpy_rank_promotion", "raise")
# Programs of 8 devices that overlap can starve each other of the few threads of 2 cores, for good.
jax.config.update("jax_cpu_enable_async_dispatch", False)
# Grain reads absl flags; nothing parses them under pytest.
flags.FLAGS.mark_as_parsed()


@pytest.fixture(scope="session")
def shared_data():
    """Folder of real data; tests that need it are skipped where it is absent."""
    path = pathlib.Path(os.environ.get("MGJAX_SHARED_DATA", ROOT / ".." / "shared" / "data")).resolve()
    if not path.is_dir():
        pytest.skip(f"no real data at '{path}' (MGJAX_SHARED_DATA names another folder)")
    return path


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture(scope="session")
def uneven():
    """A taxonomy of uneven depth: animal (cat, dog (poodle, spaniel)), vehicle (car), plant."""
    from mgjax import Taxonomy

    return Taxonomy.from_nested({"animal": {"cat": None, "dog": ["poodle", "spaniel"]}, "vehicle": ["car"], "plant": None})
