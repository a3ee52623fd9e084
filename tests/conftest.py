"""Before anything else: threads that wait without spinning, no network, and RecBole made to run."""

import logging
import os
import sys

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if "PYTEST_XDIST_WORKER" in os.environ:  # beside another of these, a second thread only waits
    os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"

import pytest
from hypothesis import HealthCheck, settings

import recbole_mllm  # noqa: F401  (registers itself with RecBole)

sys.argv = ["pytest"]  # whose words RecBole's Config would take for keys
# a slow or busy machine is no fault of what is tested
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")


@pytest.fixture(scope="session")
def demo_data(tmp_path_factory):
    """A folder of datasets, in which the demo's world is built when it is first used."""
    return tmp_path_factory.mktemp("dataset")


@pytest.fixture(autouse=True)
def open_log():
    """Undo what a RecBole run in this process did to the root logger (init_logger), which caplog listens to."""
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    root.setLevel(logging.INFO)
    logging.disable(logging.NOTSET)
    yield
    root.setLevel(level)
    for handler in [h for h in root.handlers if h not in handlers]:
        root.removeHandler(handler)
