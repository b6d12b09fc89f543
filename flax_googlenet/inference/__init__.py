"""Fast inference: folding, the predictor, export, and how JAX compiles them."""
