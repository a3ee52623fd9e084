# SHIM * -> recbole_mllm.benchmark.cases
import sys

from recbole_mllm.benchmark.cases import *  # noqa: F403

sys.modules[__name__] = sys.modules["recbole_mllm.benchmark.cases"]
