"""Storages of which each member has all of the data, and what is recorded of them."""
