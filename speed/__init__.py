"""Makes the networks faster or smaller. Loading a model applies each method with one call."""
