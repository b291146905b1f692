"""Using trained models: Hugging Face modelling code, its export, and generation with a carried cache."""
