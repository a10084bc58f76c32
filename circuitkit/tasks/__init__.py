"""Behaviours: pairs of inputs, right and wrong answers, and a metric."""
