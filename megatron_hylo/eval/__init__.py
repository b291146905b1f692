"""How good a model is: held-out perplexity, distance to its teacher."""
