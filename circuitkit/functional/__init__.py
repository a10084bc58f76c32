"""Formulas: tensors in, tensors out. Nothing here knows a model, a task or a file."""
