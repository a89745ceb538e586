"""What makes the networks faster or smaller; put in by one call when a model is loaded."""
