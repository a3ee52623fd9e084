# SHIM * -> recbole_mllm.plan.counting
import sys

from recbole_mllm.plan.counting import *  # noqa: F403

sys.modules[__name__] = sys.modules["recbole_mllm.plan.counting"]
