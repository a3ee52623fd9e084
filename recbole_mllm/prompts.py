# SHIM * -> recbole_mllm.common.prompts
import sys

from recbole_mllm.common.prompts import *  # noqa: F403

sys.modules[__name__] = sys.modules["recbole_mllm.common.prompts"]
