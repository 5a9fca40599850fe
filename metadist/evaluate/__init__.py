"""Training many fresh learners at once on a set, and saying what the set is worth."""
