"""Quality of a model: held-out perplexity, KL and agreement with its teacher."""
