"""Comparisons with other libraries, side by side in one run. Not installed with the library."""
