"""The pieces of a model as ONNX graphs: writing, adapting, checking, fusing them."""
