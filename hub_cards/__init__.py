"""Data only: templates and facts of the cards of checkpoints and of the data set. Installed with the package, never run."""
