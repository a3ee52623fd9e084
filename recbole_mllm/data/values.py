# SHIM * -> recbole_mllm.data.atomic
import sys

from recbole_mllm.data.atomic import *  # noqa: F403

sys.modules[__name__] = sys.modules["recbole_mllm.data.atomic"]
