"""Cross entropy of integer labels against given logits. The backward keeps the logits and two numbers a row."""
