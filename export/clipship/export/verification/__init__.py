"""Whether graphs, engines and servers compute what PyTorch computes."""
