# SHIM * -> recbole_mllm.inspect.health_page
import sys

from recbole_mllm.inspect.health_page import *  # noqa: F403

sys.modules[__name__] = sys.modules["recbole_mllm.inspect.health_page"]
