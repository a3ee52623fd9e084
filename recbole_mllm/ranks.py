# SHIM * -> recbole_mllm.common.distributed
import sys

from recbole_mllm.common.distributed import *  # noqa: F403

sys.modules[__name__] = sys.modules["recbole_mllm.common.distributed"]
