"""What a run leaves behind: plots, the model card, and the provenance of its numbers."""
