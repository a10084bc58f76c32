"""Laws that everything registered obeys."""
