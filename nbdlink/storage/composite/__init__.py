"""Storages that are made of several others, one after the other or in stripes."""
