# SHIM MixedPrecision -> recbole_mllm.training.optimization
from recbole_mllm.training.optimization import MixedPrecision as Precision

__all__ = ["Precision"]
