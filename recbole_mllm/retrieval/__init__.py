"""Another model's ranking of all items, of which an MLLM re-orders the best."""
