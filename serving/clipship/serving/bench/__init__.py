"""Throughput and latency of a server, compared with the same engine in process."""
