"""Training: stages as data, what each one minimises, and the loop that runs them."""
