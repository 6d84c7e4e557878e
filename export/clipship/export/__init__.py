"""From a checkpoint to a verified bundle (ONNX). Imports ``clipship.core`` and ``clipship.training``."""
