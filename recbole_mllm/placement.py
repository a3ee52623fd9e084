# SHIM check_placement -> recbole_mllm.common.device_map
from recbole_mllm.common.device_map import check_placement as check_placement
