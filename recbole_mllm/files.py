# SHIM * -> recbole_mllm.common.files
import sys

from recbole_mllm.common.files import *  # noqa: F403

sys.modules[__name__] = sys.modules["recbole_mllm.common.files"]
