"""Triton as a process: installing, starting, watching, checking it."""
