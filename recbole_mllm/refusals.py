# SHIM * -> recbole_mllm.common.errors
import sys

from recbole_mllm.common.errors import *  # noqa: F403

sys.modules[__name__] = sys.modules["recbole_mllm.common.errors"]
