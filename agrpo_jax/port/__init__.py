"""Model folders in the layout of Hugging Face <-> parameters."""
