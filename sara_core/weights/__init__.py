"""A model's weights: choose parameters, measure and select weights, read and write single ones, recognise a base."""
