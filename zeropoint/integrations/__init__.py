"""Other libraries, seen from zeropoint: one file for each, the only one that knows its insides."""
