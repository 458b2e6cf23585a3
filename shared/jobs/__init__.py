"""Jobs: their states, their SQL, and how to accept and finish them."""
