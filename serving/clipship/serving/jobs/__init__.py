"""Batch jobs: very many images in, one row an image out."""
