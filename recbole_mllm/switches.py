# SHIM wants_cpu -> recbole_mllm.common.distributed
from recbole_mllm.common.distributed import wants_cpu as wants_cpu
