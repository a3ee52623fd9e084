# SHIM * -> recbole_mllm.benchmark.significance
import sys

from recbole_mllm.benchmark.significance import *  # noqa: F403

sys.modules[__name__] = sys.modules["recbole_mllm.benchmark.significance"]
