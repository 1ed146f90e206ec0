"""How the logits of a denoising step follow from a row's present state."""
