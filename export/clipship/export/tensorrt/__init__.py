"""TensorRT plans from a bundle's ONNX files: one seam, two runtimes."""
