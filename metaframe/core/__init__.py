"""The three steps and what they are made of."""
