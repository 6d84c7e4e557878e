"""The Triton model repository: models, config.pbtxt, versions, offline checks."""
