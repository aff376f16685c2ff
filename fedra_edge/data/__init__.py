"""Local data: examples are read here and never leave the device."""
