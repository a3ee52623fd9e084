# SHIM * -> recbole_mllm.common.seeding
import sys

from recbole_mllm.common.seeding import *  # noqa: F403

sys.modules[__name__] = sys.modules["recbole_mllm.common.seeding"]
