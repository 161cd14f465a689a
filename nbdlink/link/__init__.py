"""Links: an export bound to a block device, from specification to device and back."""
