"""What many tests need: the shared data beside the repository, and the devices that models run on."""

import importlib.util
import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # tests import their helpers as `from tests import ...`


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of models, texts and expected results that lies beside the repository."""
    folder = ROOT.parent / "shared"
    if not (folder / "golden").is_dir():
        pytest.skip(f"there is no shared data beside the repository ({folder.name}/golden)")
    return folder


# CMR_TEST_DEVICES=cuda runs the same tests on a GPU, or with NUMBA_ENABLE_CUDASIM=1 in numba's simulator of one.
DEVICES = os.environ.get("CMR_TEST_DEVICES", "portable cpu").split()


@pytest.fixture(scope="session", params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    """Each device that open_model takes, where this machine has what it needs."""
    if request.param == "cuda":
        import tests.cuda_turns  # noqa: F401  (makes the simulator, where it is switched on, fast enough)
    if request.param == "cpu" and not importlib.util.find_spec("cmr.ops.cpu"):
        pytest.skip("the compiled op table is not there")
    if request.param == "cpu" and not importlib.util.find_spec("numba"):
        pytest.skip("the compiled op table needs numba")
    return request.param
