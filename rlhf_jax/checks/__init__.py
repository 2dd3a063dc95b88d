"""Laws of attention as functions that measure: how far off, and how far it may be. The tests and ``check`` run them."""
