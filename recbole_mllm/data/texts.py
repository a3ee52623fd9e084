# SHIM * -> recbole_mllm.data.item_table
import sys

from recbole_mllm.data.item_table import *  # noqa: F403

sys.modules[__name__] = sys.modules["recbole_mllm.data.item_table"]
