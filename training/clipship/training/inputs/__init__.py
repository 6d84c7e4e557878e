"""From image files to tensors: batches, views, cached features."""
