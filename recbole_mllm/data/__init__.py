"""Atomic files, texts and images of a dataset."""
