"""Finding and loading models by name; released models as data; what a model costs."""
