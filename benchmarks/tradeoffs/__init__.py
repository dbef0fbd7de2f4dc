"""The paper's figures A2 and A3: what every method makes of the same pictures, by its parameter."""
