"""What people type: the argument parsers, and how results look on a screen."""
