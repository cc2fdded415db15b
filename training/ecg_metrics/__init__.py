"""The figures of this project, each in one place: for training, and as a metric that `evaluate.load` takes (README.md)."""
