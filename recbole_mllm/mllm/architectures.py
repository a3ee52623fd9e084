# SHIM * -> recbole_mllm.mllm.families
import sys

from recbole_mllm.mllm.families import *  # noqa: F403

sys.modules[__name__] = sys.modules["recbole_mllm.mllm.families"]
