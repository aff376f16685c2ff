"""Cuts a model that exists only as ONNX into pieces."""
