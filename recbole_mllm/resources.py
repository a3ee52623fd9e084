# SHIM * -> recbole_mllm.common.resources
import sys

from recbole_mllm.common.resources import *  # noqa: F403

sys.modules[__name__] = sys.modules["recbole_mllm.common.resources"]
