"""Vectors of items' texts and images, made once by an MLLM, as RecBole's pretrained features."""
