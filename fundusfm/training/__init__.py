"""Training: the run folder, the Lightning trainer, checkpoints and what a person sees of them."""
