"""The operations: each makes a plan, compiles it to a recipe, and applies it to a copy."""
