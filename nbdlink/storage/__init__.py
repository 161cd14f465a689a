"""What an export is made of: `base` says what every storage can do, the others are storages."""
