# SHIM * -> recbole_mllm.mllm.encoder
import sys

from recbole_mllm.mllm.encoder import *  # noqa: F403

sys.modules[__name__] = sys.modules["recbole_mllm.mllm.encoder"]
