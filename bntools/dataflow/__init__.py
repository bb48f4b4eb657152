"""A model as a neutral graph: what it computes, whichever way it was written."""
