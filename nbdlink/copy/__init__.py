"""Copying images between files, devices, exports and streams.

`image.copy` is all of it. `ends` and `files` are what can be copied from and to, `engine` moves
the data, `ranges` does so between two files, and `verify` compares.
"""
