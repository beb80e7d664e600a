"""Faults on real servers while requests run: what is killed, cut off, replaced or made to fail, and what the requests come to."""
