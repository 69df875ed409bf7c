"""A linear layer (the head of a language model) and cross entropy as one op: the logits never exist as a whole."""
