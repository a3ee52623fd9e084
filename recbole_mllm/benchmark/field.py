# SHIM * -> recbole_mllm.benchmark.variants
import sys

from recbole_mllm.benchmark.variants import *  # noqa: F403

sys.modules[__name__] = sys.modules["recbole_mllm.benchmark.variants"]
