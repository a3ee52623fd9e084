# SHIM * -> recbole_mllm.benchmark.evidence
import sys

from recbole_mllm.benchmark.evidence import *  # noqa: F403

sys.modules[__name__] = sys.modules["recbole_mllm.benchmark.evidence"]
