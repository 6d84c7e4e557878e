"""The network seam: tensors in, tensors out, over gRPC or shared memory."""
