# SHIM * -> recbole_mllm.common.fitting
import sys

from recbole_mllm.common.fitting import *  # noqa: F403

sys.modules[__name__] = sys.modules["recbole_mllm.common.fitting"]
