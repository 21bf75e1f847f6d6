"""Training a small GPT from scratch; `microscale.recipes.train` is the verb."""
