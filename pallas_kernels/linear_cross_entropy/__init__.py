"""A linear layer (a language model's head) and the cross entropy of its output as one op, so that the logits never exist as a whole."""
