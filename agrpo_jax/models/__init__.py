"""Parameters -> logits: the transformer, adapters, families, tokenizers."""
