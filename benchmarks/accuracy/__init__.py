"""How near each warm-started scheme comes to the SVD for a number of readings of W."""
