"""Training: settings, recipe, sampling, reference pass, trainer, checkpoints."""
