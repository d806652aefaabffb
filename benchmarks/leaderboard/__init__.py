"""Models trained and evaluated alike, in one table that can be recomputed from every user's ranks."""
