"""How steps run."""
