# SHIM * -> recbole_mllm.mllm.generation
import sys

from recbole_mllm.mllm.generation import *  # noqa: F403

sys.modules[__name__] = sys.modules["recbole_mllm.mllm.generation"]
