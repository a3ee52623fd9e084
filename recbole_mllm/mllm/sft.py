# SHIM * -> recbole_mllm.mllm.loss
import sys

from recbole_mllm.mllm.loss import *  # noqa: F403

sys.modules[__name__] = sys.modules["recbole_mllm.mllm.loss"]
