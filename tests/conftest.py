"""Which tests run and in which order, and fixtures: the random reference as a state dict, in PyTorch and in Flax."""

import gc
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from typing import Any

# The imports make a million objects that stay. To search them a dozen times would take the garbage collector a fifth of
# the imports' time: it is off until the tests start.
gc.disable()

# One thread for PyTorch, here and in the processes that tests start. OpenMP's threads spin while they wait for each
# other: with more threads than free cores, as beside another worker of pytest-xdist, a step took 20 times the CPU time.
os.environ["OMP_NUM_THREADS"] = "1"

import jax
import jaxtyping
import numpy as np
import pytest
import reference
import torch
from torchvision.models import GoogLeNet as TorchGoogLeNet

import flax_googlenet

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")  # the library must not lean on implicit promotion

StateDict = Mapping[str, np.ndarray]


# Those that take more than a minute, the longest first.
LONGEST_FILES = (
    "test_step.py",
    "test_loop.py",
    "test_port_weights.py",
    "test_predictor.py",
    "test_classify.py",
    "test_docs.py",
    "test_model.py",
    "test_bvlc.py",
    "test_inception5h.py",
    "test_checkpoint.py",
)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out tests marked aot, benchmark or fault unless -m names the marker, and run the longest files first.

    A -m in ``addopts`` would not do: the one on the command line replaces it, and ``-m "not slow"`` would run them.
    """
    unasked = [marker for marker in ("aot", "benchmark", "fault") if marker not in config.option.markexpr]
    left_out = [item for item in items if any(map(item.get_closest_marker, unasked))]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]
    # What starts last keeps one worker of pytest-xdist busy while the others have nothing left to do.
    rank = {name: i for i, name in enumerate(LONGEST_FILES)}
    items.sort(key=lambda item: rank.get(item.path.name, len(rank)))


@pytest.hookimpl(tryfirst=True)  # a worker of pytest-xdist has a loop of its own
def pytest_runtestloop() -> None:
    """Turn the garbage collector on, which is off during the imports."""
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session", autouse=True)
def _compilation_cache(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> None:
    """What one test has compiled serves the others, in all workers of pytest-xdist and in the processes they start.

    If JAX_COMPILATION_CACHE_DIR is set, the cache is there, and serves the next run too.
    """
    folder = tmp_path_factory.getbasetemp()
    folder = folder if worker_id == "master" else folder.parent
    cache = os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder / "jax"))
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"


@pytest.fixture(scope="session", autouse=True)
def _children_hear_ctrl_c() -> Iterator[None]:
    """A script's job in the background ignores Ctrl-C, and so would every process that a test starts and interrupts.

    A new program inherits that a signal is ignored, and gets the default action where Python has a handler.
    """
    before = signal.getsignal(signal.SIGINT)
    if before is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def unchecked_annotations() -> Iterator[None]:
    """For a test that passes what an annotation forbids, to see how the library itself refuses it."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="session")
def state_dict() -> StateDict:
    """float32, 364 tensors, 1000 classes; no BatchNorm statistic is 0 or 1."""
    return {key: tensor.numpy() for key, tensor in reference.random_checkpoint().items()}


@pytest.fixture(scope="session")
def variables(state_dict: StateDict) -> dict[str, Any]:
    return flax_googlenet.from_torchvision(state_dict)


@pytest.fixture(scope="session")
def variables64(variables: dict[str, Any]) -> dict[str, Any]:
    return jax.tree.map(lambda x: x.astype(np.float64), variables)


@pytest.fixture(scope="session")
def torch64(state_dict: StateDict) -> TorchGoogLeNet:
    return reference.build(state_dict, transform_input=False, dtype=torch.float64)


@pytest.fixture(scope="session")
def torch32(state_dict: StateDict) -> TorchGoogLeNet:
    return reference.build(state_dict, transform_input=False, dtype=torch.float32)


@pytest.fixture(scope="session")
def photographs() -> np.ndarray:
    """float32 [2, 224, 224, 3], by torchvision's own preset."""
    return np.stack([reference.preset(photograph) for photograph in reference.photographs()])


@pytest.fixture(scope="session")
def random_images() -> Callable[..., np.ndarray]:
    """(n, h, w) -> float64 [n, h, w, 3], normal, rounded to float32."""

    def make(n: int, h: int, w: int) -> np.ndarray:
        rng = np.random.default_rng([n, h, w])
        return rng.standard_normal((n, h, w, 3)).astype(np.float32).astype(np.float64)

    return make
