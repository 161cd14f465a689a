"""Benchmarks beside the programs of others; `make bench` and `make bench-attach` run them."""
