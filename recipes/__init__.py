"""Recipes: the main training job, its models and its data."""
