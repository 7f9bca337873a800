"""The three stages and what surrounds them. Only here do model, loss, data and rollout meet."""
