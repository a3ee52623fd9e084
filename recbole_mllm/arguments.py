# SHIM * -> recbole_mllm.common.console
import sys

from recbole_mllm.common.console import *  # noqa: F403

sys.modules[__name__] = sys.modules["recbole_mllm.common.console"]
