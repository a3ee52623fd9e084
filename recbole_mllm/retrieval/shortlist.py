# SHIM Shortlist -> recbole_mllm.retrieval.reranker
from recbole_mllm.retrieval.reranker import Shortlist  # noqa: F401
