# SHIM * -> recbole_mllm.registration
import sys

from recbole_mllm.registration import *  # noqa: F403

sys.modules[__name__] = sys.modules["recbole_mllm.registration"]
