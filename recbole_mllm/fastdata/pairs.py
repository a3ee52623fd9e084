# SHIM Pairs -> recbole_mllm.data.sampling
from recbole_mllm.data.sampling import Pairs  # noqa: F401
