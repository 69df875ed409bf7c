"""Cross entropy of integer labels against given logits, in one pass, keeping only the logits and two numbers a row for the backward."""
