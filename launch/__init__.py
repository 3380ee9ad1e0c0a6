"""How stages get onto machines."""
