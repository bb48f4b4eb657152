"""Taking the statistics of norm layers from data, on one process or many."""
