# SHIM * -> recbole_mllm.common.yaml_files
import sys

from recbole_mllm.common.yaml_files import *  # noqa: F403

sys.modules[__name__] = sys.modules["recbole_mllm.common.yaml_files"]
