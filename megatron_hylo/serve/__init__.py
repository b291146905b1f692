"""Generation with a carried cache, datasets that a model writes, and vllm/, the plugin of vLLM; modelling code is in hf/."""
