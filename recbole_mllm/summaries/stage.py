# SHIM * -> recbole_mllm.summaries.generator
import sys

from recbole_mllm.summaries.generator import *  # noqa: F403

sys.modules[__name__] = sys.modules["recbole_mllm.summaries.generator"]
