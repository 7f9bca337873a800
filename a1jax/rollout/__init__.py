"""Runs sampled from a model: the jitted step (``sampler``) and the loop of turns, tools and budgets around it (``agent``)."""
