"""How good a trained model is: held-out material, and recognisers that nobody here wrote."""
