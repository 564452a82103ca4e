"""The measuring pipeline: suites and published protocols, run on a model or a training run, kept as hashed records."""
