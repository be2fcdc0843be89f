"""NaN, infinity and underflow: where they begin, why, and what would keep the numbers in range."""
