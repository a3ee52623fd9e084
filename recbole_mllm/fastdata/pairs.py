# SHIM Pairs -> recbole_mllm.data.sampling
from recbole_mllm.data.sampling import Pairs as Pairs  # noqa: F401
