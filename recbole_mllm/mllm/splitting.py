# SHIM * -> recbole_mllm.mllm.sharding
import sys

from recbole_mllm.mllm.sharding import *  # noqa: F403

sys.modules[__name__] = sys.modules["recbole_mllm.mllm.sharding"]
